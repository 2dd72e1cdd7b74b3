"""Classifier-free guidance."""

from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Moves a prediction away from the unconditional one, (…) and (…) -> (…).

    ε̃ = ε(z) + s (ε(z, c) - ε(z)): Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, in the form of GLIDE
    (arXiv:2112.10741), whose scale s is Ho & Salimans's w plus 1. So 0 is unconditional, 1 is no guidance, and larger
    than 1 exaggerates the condition. Linear in the prediction, so that it holds for ε, v and x₀ alike.
    """
    return unconditional + guidance_scale * (conditional - unconditional)
