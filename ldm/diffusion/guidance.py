"""Guidance: classifier-free, its refinements, and that by CLIP."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import amounts, spread


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Moves a prediction away from the unconditional one, (…) and (…) -> (…).

    ε̃ = ε(z) + s (ε(z, c) - ε(z)): Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, in the form of GLIDE
    (arXiv:2112.10741), whose scale s is Ho & Salimans's w plus 1. So 0 is unconditional, 1 is no guidance, and larger
    than 1 exaggerates the condition. Linear in the prediction, so that it holds for ε, v and x₀ alike.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, rescale: float) -> Tensor:
    """The guided prediction (B, …) with its standard deviation brought back to the conditional one's, by a share
    `rescale` in [0, 1]: against overexposed pictures (Lin et al. 2024, arXiv:2305.08891, equations 15 and 16).
    Of the precision of `guided`.

    Raises:
        ValueError: rescale outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {rescale:g}")
    ratio = conditional.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)
    return (guided * (rescale * spread(ratio, guided) + (1 - rescale))).to(guided.dtype)


def scale_in_interval(guidance_scale: float, noise_level: float, interval: tuple[float, float]) -> float:
    """The scale inside `interval`, and 1, no guidance, outside: at high noise guidance costs variety, at low noise
    it changes nothing (Kynkäänniemi et al. 2024, arXiv:2404.07724, equation 6).

    noise_level: √(1 - ᾱ_t), the share of noise in x_t, in [0, 1]; the interval is closed.

    Raises:
        ValueError: an interval that is empty or not in [0, 1].
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be (low, high) with 0 <= low <= high <= 1, got ({low:g}, {high:g})")
    return guidance_scale if low <= noise_level <= high else 1.0


def clip_guidance(
    epsilon: Tensor, x_t: Tensor, alpha_bar_t: Tensor, similarity: Callable[[Tensor], Tensor], scale: float
) -> Tensor:
    """ε̃ = ε - s √(1 - ᾱ_t) ∇ f(x_t)·g(c), (B, …): guidance by a CLIP that has learned to read noised images
    (Nichol et al. 2021, GLIDE, arXiv:2112.10741, §2.4), in the form for ε of Dhariwal & Nichol 2021, algorithm 2.

    similarity: x_t (B, …) -> f(x_t)·g(c) (B,), differentiable; alpha_bar_t (B,).

    Raises:
        ValueError: scale < 0.
    """
    if not scale >= 0:
        raise ValueError(f"scale must be >= 0, got {scale:g}")
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(similarity(x).sum(), x)
    return epsilon - scale * amounts(alpha_bar_t, x_t)[1] * gradient
