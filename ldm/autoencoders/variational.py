"""Variational autoencoder: likelihoods, the ELBO and the importance-weighted bound (Kingma & Welling 2014).

All in nats, with every constant; `bits_per_dim` converts. q_φ(z | x) is a diagonal Gaussian, the prior standard normal.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def reparameterise(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """z = μ + σ ε (Kingma & Welling 2014, §2.4); noise standard normal, like mean."""
    return mean + (0.5 * logvar).exp() * noise


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) (B,) (Kingma & Welling 2014, appendix B). mean, logvar (B, …)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


def bernoulli_log_likelihood(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) (B,) of independent Bernoullis; x (B, …) in {0, 1}, or, as is usual for grey levels, in [0, 1].

    Between 0 and 1 it is no density (Loaiza-Ganem & Cunningham 2019), and comparable with nothing else.

    Raises:
        ValueError: x outside [0, 1].
    """
    if len(outside := x[(x < 0) | (x > 1)]):
        raise ValueError(f"x must be in [0, 1] for a Bernoulli likelihood, got {outside[0].item():g}")
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(dim=1)


def gaussian_log_likelihood(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)) (B,) of independent elements; logvar as x, or one for all.

    Raises:
        ValueError: x is not finite.
    """
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite for a Gaussian likelihood, got NaN or infinity")
    return (-0.5 * ((x - mean) ** 2 * (-logvar).exp() + logvar) - HALF_LOG_2PI).flatten(1).sum(dim=1)


def elbo(log_likelihood: Tensor, kl: Tensor, beta: float = 1.0) -> Tensor:
    """E_q log p_θ(x | z) - β KL(q_φ(z | x) ‖ p(z)) (B,); the bound on log p(x) for β = 1, β-VAE's objective otherwise
    (Higgins et al. 2017, equation 4). Training minimises its negative.

    Raises:
        ValueError: beta < 0.
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta:g}")
    return log_likelihood - beta * kl


def importance_weighted_bound(log_likelihoods: Tensor, z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log 1/K Σ p(x | z_k) p(z_k) / q(z_k | x) (B,): between ELBO and log p(x), and no lower on average with more
    samples (Burda et al. 2016, equation 8 and theorem 1).

    log_likelihoods (K, B) of the samples z (K, B, D) from the posterior mean, logvar (B, D).
    """
    log_prior = (-0.5 * z**2 - HALF_LOG_2PI).sum(dim=-1)
    log_posterior = (-0.5 * ((z - mean) ** 2 * (-logvar).exp() + logvar) - HALF_LOG_2PI).sum(dim=-1)
    return torch.logsumexp(log_likelihoods + log_prior - log_posterior, dim=0) - math.log(len(z))


def bits_per_dim(log_likelihood: Tensor, dimensions: int, levels: int | None = None) -> Tensor:
    """-log p in bits for each of x's dimensions. With `levels`, x was grey levels scaled to [0, 1], for which a density
    counts the levels: log2(levels) is added (Theis et al. 2016, §3.1)."""
    bits = -log_likelihood / (dimensions * math.log(2))
    return bits if levels is None else bits + math.log2(levels)
