"""The forward process and what a network may predict of it. `alpha_bar_t` (B,) is ᾱ at each sample's timestep."""

import torch
from torch import Tensor


def q_sample(x_0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (Ho et al. 2020, equation 4). x_0, noise (B, …)."""
    alpha_bar_t = _spread(alpha_bar_t, x_0)
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * noise


def velocity(x_0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """v = √ᾱ_t ε - √(1 - ᾱ_t) x_0 (Salimans & Ho 2022, appendix D)."""
    alpha_bar_t = _spread(alpha_bar_t, x_0)
    return alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0


def prediction_target(prediction_type: str, x_0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """What the network is to predict: `epsilon`, `v_prediction` or `sample` (x_0)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(x_0, alpha_bar_t, noise)
    if prediction_type == "sample":
        return x_0
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


def _spread(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, …) with as many dimensions, and the precision, of `like`."""
    return per_sample.to(like.device, torch.promote_types(like.dtype, torch.float32)).view(-1, *[1] * (like.ndim - 1))
