"""Noise schedules: β_t, t = 1 … T, and ᾱ_t = ∏ (1 - β_s). Index 0 of each tensor is t = 1, as in diffusers."""

import math

import torch
from torch import Tensor


def betas(name: str, num_timesteps: int) -> Tensor:
    """β (T,) in float64.

    `linear`: Ho et al. 2020, §4. `scaled_linear`: linear in √β, Rombach et al. 2022. `squaredcos_cap_v2`: cosine,
    Nichol & Dhariwal 2021, equation 17, capped at 0.999. Endpoints are diffusers' defaults (1e-4 and 0.02).
    """
    if name == "linear":
        return torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(1e-4**0.5, 0.02**0.5, num_timesteps, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        s = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, got {name!r}")


def alphas_bar(name: str, num_timesteps: int) -> Tensor:
    """ᾱ (T,) in float64."""
    return torch.cumprod(1 - betas(name, num_timesteps), dim=0)


def betas_of(alpha_bar: Tensor) -> Tensor:
    """β (T,) of the process whose ᾱ (T,) is given: 1 - ᾱ_t / ᾱ_{t-1}."""
    return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ / (1 - ᾱ) (Kingma et al. 2021, equation 2)."""
    return alpha_bar / (1 - alpha_bar)


def log_snr(alpha_bar: Tensor) -> Tensor:
    """λ = log ᾱ - log(1 - ᾱ) (Kingma et al. 2021, equation 3)."""
    return torch.logit(alpha_bar)


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """ᾱ (T,) whose last is 0, so that the last x_t is noise and nothing else: √ᾱ shifted and scaled, the first kept
    (Lin et al. 2024, algorithm 1). Not for networks that predict ε, which then says nothing of the image."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
