"""Corruptions of an image from which a denoising autoencoder restores it (Vincent et al. 2008)."""

from torch import Tensor


def mask(x: Tensor, proportion: float, draws: Tensor) -> Tensor:
    """x (B, …) with a fixed proportion of each sample's elements set to 0 (Vincent et al. 2008, §2.3).

    draws, like x, from any continuous distribution: the elements with the smallest go, round(proportion · elements)
    of them.

    Raises:
        ValueError: proportion outside [0, 1].
    """
    if not 0 <= proportion <= 1:
        raise ValueError(f"proportion must be in [0, 1], got {proportion:g}")
    flat = draws.flatten(1)
    ranks = flat.argsort(dim=1).argsort(dim=1)
    kept = ranks >= round(proportion * flat.shape[1])
    return x * kept.view(x.shape)


def add_noise(x: Tensor, deviation: float, noise: Tensor) -> Tensor:
    """x + deviation · noise, all (B, …), noise standard normal.

    Raises:
        ValueError: deviation < 0.
    """
    if deviation < 0:
        raise ValueError(f"deviation must be >= 0, got {deviation:g}")
    return x + deviation * noise
