"""The forward process, its posterior, and what a network may predict. `alpha_bar_t` (B,) is ᾱ at each one's timestep.

Timesteps are counted from 0 as in diffusers: t = 0 is the papers' 1, before which the image is clean and ᾱ is 1.
"""

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "score")


def at_timestep(values: Tensor, t: Tensor) -> Tensor:
    """Of a schedule's values (T,), those (B,) of the timesteps t (B,), integers in 0 … T - 1.

    Raises:
        ValueError: a timestep outside that range.
    """
    if len(outside := t[(t < 0) | (t >= len(values))]):
        raise ValueError(f"t must be in 0 … {len(values) - 1}, got {outside[0].item()}")
    return values[t]


def before_timestep(alpha_bar: Tensor, t: Tensor) -> Tensor:
    """ᾱ_{t-1} (B,) from a schedule's ᾱ (T,): 1 where t is 0. Raises ValueError as `at_timestep` does."""
    return at_timestep(torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]]), t)


def q_step(x_before: Tensor, beta_t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √(1 - β_t) x_{t-1} + √β_t ε (Ho et al. 2020, equation 2). x_before, noise (B, …); beta_t (B,)."""
    beta_t = spread(beta_t, x_before)
    return (1 - beta_t).sqrt() * x_before + beta_t.sqrt() * noise


def q_sample(x_0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε (Ho et al. 2020, equation 4). x_0, noise (B, …)."""
    signal, deviation = amounts(alpha_bar_t, x_0)
    return signal * x_0 + deviation * noise


def q_posterior(x_0: Tensor, x_t: Tensor, alpha_bar_t: Tensor, alpha_bar_before: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, …) and variance (B, 1, …) of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, equations 6 and 7).

    x_0, x_t (B, …); `alpha_bar_before` (B,) is ᾱ_{t-1}. The variance is β̃_t, which is 0 where that is 1.
    """
    alpha_t = alpha_bar_t / alpha_bar_before
    of_clean = alpha_bar_before.sqrt() * (1 - alpha_t) / (1 - alpha_bar_t)
    of_noised = alpha_t.sqrt() * (1 - alpha_bar_before) / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_before) / (1 - alpha_bar_t) * (1 - alpha_t)
    return spread(of_clean, x_0) * x_0 + spread(of_noised, x_0) * x_t, spread(variance, x_0)


def velocity(x_0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """v = √ᾱ_t ε - √(1 - ᾱ_t) x_0 (Salimans & Ho 2022, appendix D)."""
    signal, deviation = amounts(alpha_bar_t, x_0)
    return signal * noise - deviation * x_0


def prediction_target(prediction_type: str, x_0: Tensor, alpha_bar_t: Tensor, noise: Tensor) -> Tensor:
    """What the network is to predict of a sample (B, …): `epsilon`, `v_prediction`, `sample` (x_0), or `score`,
    ∇ log q(x_t | x_0) = -ε / √(1 - ᾱ_t) (Song et al. 2021, equation 29 and appendix C)."""
    _check_prediction(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(x_0, alpha_bar_t, noise)
    if prediction_type == "sample":
        return x_0
    return -noise / amounts(alpha_bar_t, noise)[1]


def clean_and_noise(
    prediction: Tensor, prediction_type: str, x_t: Tensor, alpha_bar_t: Tensor
) -> tuple[Tensor, Tensor]:
    """x̂_0 and ε̂ (B, …) that a prediction at x_t (B, …) amounts to: x_t = √ᾱ_t x̂_0 + √(1 - ᾱ_t) ε̂.

    `epsilon` and `score` say nothing of x_0 where ᾱ_t is 0, as with zero terminal SNR, nor `sample` of ε where it is 1.
    """
    _check_prediction(prediction_type)
    a, s = amounts(alpha_bar_t, x_t)
    if prediction_type == "sample":
        return prediction, (x_t - a * prediction) / s
    if prediction_type == "v_prediction":
        return a * x_t - s * prediction, s * x_t + a * prediction
    noise = -s * prediction if prediction_type == "score" else prediction
    return (x_t - s * noise) / a, noise


def convert(prediction: Tensor, given: str, wanted: str, x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """A prediction (B, …) of kind `given`, at x_t, as the equal one of kind `wanted`; kinds as in `prediction_target`.

    Raises:
        ValueError: an unknown kind.
    """
    x_0, noise = clean_and_noise(prediction, given, x_t, alpha_bar_t)
    return prediction_target(wanted, x_0, alpha_bar_t, noise)


def _check_prediction(prediction_type: str) -> None:
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")


def amounts(alpha_bar_t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 - ᾱ_t) of (B,), how much of x_t is signal and how much noise, as `spread` has them.

    1 - ᾱ_t is taken in the precision of ᾱ_t, not of `like`: in float32 but four digits of it are right at t = 0.
    """
    return spread(alpha_bar_t.sqrt(), like), spread((1 - alpha_bar_t).sqrt(), like)


def spread(per_sample: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, …) with as many dimensions, and the precision, of `like`."""
    return per_sample.to(like.device, torch.promote_types(like.dtype, torch.float32)).view(-1, *[1] * (like.ndim - 1))
