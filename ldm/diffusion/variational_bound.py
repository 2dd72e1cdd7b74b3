"""The variational bound on -log p(x_0) of a diffusion model, term by term (Ho et al. 2020, equation 5).

    -log p(x_0) <= L_T + Σ_{t>=1} L_t + L_0      with t counted from 0, as in `process`

    L_T   KL(q(x_T | x_0) ‖ N(0, I))
    L_t   KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t)), Gaussians both
    L_0   -log p_θ(x_0 | x_1): of images of 256 grey levels by a discretised Gaussian

All are in bits per dimension.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.process import at_timestep, before_timestep, clean_and_noise, q_posterior, q_sample
from ldm.diffusion.schedule import betas_of

GREY_STEP = 2 / 255
"""Distance of neighbouring grey levels of images in [-1, 1]."""
LEARNED = "learned_range"
VARIANCES = ("fixed_small", "fixed_large", LEARNED)
"""β̃_t, β_t (Ho et al. 2020, §3.2), or between them as the network says; names as in diffusers."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, …), t (B,)) -> prediction (B, C, …), or (B, 2C, …) with a learned variance."""


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, variance_1) ‖ N(mean_2, variance_2)) of each element, in nats."""
    log_ratio = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that N(mean, variance) puts on each grey level's interval, in nats (Ho et al. 2020, equation 13).

    x: images of 256 grey levels, scaled to [-1, 1]; the intervals of black and white reach to infinity.

    Raises:
        ValueError: x outside [-1, 1].
    """
    if len(outside := x[x.abs() > 1 + 1e-6]):
        raise ValueError(f"x must be in [-1, 1], got {outside.flatten()[0].item():g}")
    scale = (-0.5 * log_variance).exp()
    above = torch.where(x > 1 - GREY_STEP / 4, torch.inf, scale * (x + GREY_STEP / 2 - mean))
    below = torch.where(x < -1 + GREY_STEP / 4, -torch.inf, scale * (x - GREY_STEP / 2 - mean))
    # Both ends on the side of the mean where the normal's tail is small, so that no mass is a difference of ones
    flip = (above + below).nan_to_num() > 0
    above, below = torch.where(flip, -below, above), torch.where(flip, -above, below)
    log_above, log_below = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return log_above + torch.log1p(-(log_below - log_above).exp())


def gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, variance) of each element, in nats: the decoder of latents, which know no grey levels."""
    return -0.5 * ((x - mean) ** 2 * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def log_variance(kind: str, output: Tensor | None, beta_t: Tensor, posterior_variance: Tensor) -> Tensor:
    """log of the variance of p_θ(x_{t-1} | x_t), (B, 1, …) or as `output`.

    `learned_range`: exp(v log β_t + (1 - v) log β̃_t), v = (output + 1) / 2 (Nichol & Dhariwal 2021, equation 15).
    beta_t, posterior_variance (B, 1, …), the latter β̃_t, where it is 0 that of the next timestep.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {kind!r}")
    if kind == "fixed_small":
        return posterior_variance.log()
    if kind == "fixed_large":
        return beta_t.log()
    v = (output + 1) / 2
    return v * beta_t.log() + (1 - v) * posterior_variance.log()


def split_output(output: Tensor, channels: int, variance: str) -> tuple[Tensor, Tensor | None]:
    """A network's output as prediction (B, C, …) and, where the variance is learned, what it says of that.

    Raises:
        ValueError: the output has another number of channels than the image, or, learned, than twice that.
    """
    wanted = 2 * channels if variance == LEARNED else channels
    if output.shape[1] != wanted:
        raise ValueError(f"output must have {wanted} channels with variance {variance!r}, got {output.shape[1]}")
    return (output[:, :channels], output[:, channels:]) if variance == LEARNED else (output, None)


def prior_term(x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """L_T (B,): what the noisiest x_T still says of x_0 (B, …). alpha_bar (T,)."""
    last = alpha_bar[-1].to(x_0)
    zero = torch.zeros_like(x_0)
    return _bits(normal_kl(last.sqrt() * x_0, torch.log1p(-last).expand_as(x_0), zero, zero))


def bound_term(
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    prediction_type: str,
    variance: str = "fixed_small",
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor] = discretised_log_likelihood,
) -> Tensor:
    """L_t (B,) of a network's output at x_t; of L_0 where t is 0. x_0, x_t (B, C, …); t (B,); alpha_bar (T,).

    `decoder` is log p_θ(x_0 | x_1) of each element, from x_0, mean and log-variance.

    Raises:
        ValueError: a timestep, kind of prediction or of variance, or number of channels that cannot be.
    """
    alpha_bar_t, alpha_bar_before = at_timestep(alpha_bar, t), before_timestep(alpha_bar, t)
    prediction, said = split_output(output, x_0.shape[1], variance)
    x_0_hat, _ = clean_and_noise(prediction, prediction_type, x_t, alpha_bar_t)
    mean_hat, _ = q_posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_before)
    mean, posterior_variance = q_posterior(x_0, x_t, alpha_bar_t, alpha_bar_before)
    shape = posterior_variance.shape
    # β̃_0 is 0; its logarithm is clipped to that of the next, as the decoder needs some width
    clipped = at_timestep(clipped_posterior_variance(alpha_bar), t).to(x_0).view(shape)
    beta_t = at_timestep(betas_of(alpha_bar), t).to(x_0).view(shape)
    log_variance_hat = log_variance(variance, said, beta_t, clipped).expand_as(x_0)
    divergence = normal_kl(mean, clipped.log(), mean_hat, log_variance_hat)
    negative_log_likelihood = -decoder(x_0, mean_hat, log_variance_hat)
    return _bits(torch.where((t == 0).view(shape), negative_log_likelihood, divergence))


def clipped_posterior_variance(alpha_bar: Tensor) -> Tensor:
    """β̃ (T,) of a schedule's ᾱ (T,), the first, which is 0, replaced by the second."""
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    variance = (1 - before) / (1 - alpha_bar) * betas_of(alpha_bar)
    return torch.cat([variance[1:2], variance[1:]])


def epsilon_weights(alpha_bar: Tensor, variance: str = "fixed_small") -> Tensor:
    """β_t² / (2 σ_t² α_t (1 - ᾱ_t)) (T,): the weights on ‖ε̂ - ε‖² that make it the bound, in nats, up to a constant
    (Ho et al. 2020, equation 12); L_simple leaves them out. The first is the next one's, as its term is the decoder's.
    """
    beta = betas_of(alpha_bar)
    sigma_squared = log_variance(variance, None, beta, clipped_posterior_variance(alpha_bar)).exp()
    weights = beta**2 / (2 * sigma_squared * (1 - beta) * (1 - alpha_bar))
    return torch.cat([weights[1:2], weights[1:]])


@torch.no_grad()
def variational_bound(
    network: Network,
    x_0: Tensor,
    alpha_bar: Tensor,
    prediction_type: str,
    generator: torch.Generator,
    variance: str = "fixed_small",
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor] = discretised_log_likelihood,
) -> Tensor:
    """The whole bound (B,) on -log p(x_0) in bits per dimension: all T terms, one draw of x_t for each.

    x_0 (B, C, …); alpha_bar (T,). T evaluations of the network.
    """
    total = prior_term(x_0, alpha_bar)
    for step in reversed(range(len(alpha_bar))):
        t = torch.full((len(x_0),), step, device=x_0.device)
        noise = torch.randn(x_0.shape, generator=generator, device=generator.device, dtype=x_0.dtype).to(x_0.device)
        x_t = q_sample(x_0, at_timestep(alpha_bar, t), noise)
        total += bound_term(network(x_t, t), x_0, x_t, t, alpha_bar, prediction_type, variance, decoder)
    return total


def hybrid_loss(
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    target: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    prediction_type: str = "epsilon",
    weight: float = 1e-3,
) -> Tensor:
    """L_hybrid (B,) = L_simple + λ L_vlb of a network (B, 2C, …) that predicts `target` and learns its variance.

    The bound's gradient reaches the variance alone (Nichol & Dhariwal 2021, equation 16 and §3.1); L_vlb is T times
    its term at t, so that its mean over uniform t is the bound.
    """
    prediction, said = split_output(output, x_0.shape[1], LEARNED)
    simple = ((prediction - target) ** 2).flatten(1).mean(dim=1)
    detached = torch.cat([prediction.detach(), said], dim=1)
    bound = bound_term(detached, x_0, x_t, t, alpha_bar, prediction_type, LEARNED)
    return simple + weight * len(alpha_bar) * bound


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2)
