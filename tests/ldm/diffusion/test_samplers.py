"""Diffusers' schedulers, which draw for us, with a network that is exact: a mixture in the plane whose score is known.

Their samples have the data's moments, and the errors of those that solve the flow fall with their order.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm.diffusion import schedule
from ldm.diffusion.mixture import two_in_the_plane

DOUBLE = torch.float64
MIXTURE = two_in_the_plane()
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def sample(scheduler, steps, x, generator=None):
    """What `scheduler` makes of standard normal x in `steps` steps."""
    alpha_bar = schedule.alphas_bar("linear", 1000)
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    stochastic = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
    for number, t in enumerate(scheduler.timesteps):
        level = 1 / (1 + scheduler.sigmas[number].double() ** 2) if hasattr(scheduler, "sigmas") else alpha_bar[int(t)]
        prediction = MIXTURE.epsilon(scheduler.scale_model_input(x, t).double(), level.item())
        x = scheduler.step(prediction, t, x, **stochastic).prev_sample.double()
    return x


@pytest.mark.parametrize(
    ("scheduler", "steps", "tolerance"),
    [
        (DDPMScheduler(**LINEAR, clip_sample=False), 1000, 0.04),
        (DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing"), 50, 0.1),
        (DPMSolverMultistepScheduler(**LINEAR, timestep_spacing="trailing"), 20, 0.04),
        (UniPCMultistepScheduler(**LINEAR, timestep_spacing="trailing"), 20, 0.04),
        (HeunDiscreteScheduler(**LINEAR, timestep_spacing="trailing"), 20, 0.04),
        (EulerDiscreteScheduler(**LINEAR, timestep_spacing="trailing"), 50, 0.1),
    ],
    ids=["DDPM 1000", "DDIM 50", "DPM-Solver++ 20", "UniPC 20", "Heun 20", "Euler 50"],
)
def test_samples_have_the_moments_of_the_data(scheduler, steps, tolerance, request):
    """20,000 of them; the methods of first order are allowed more, at 50 steps."""
    generator = torch.Generator().manual_seed(0)
    x = sample(scheduler, steps, torch.randn(20_000, 2, generator=generator, dtype=DOUBLE), generator)
    mean, covariance = MIXTURE.moments()
    errors = (x.mean(0) - mean).abs().max().item(), (x.T.cov() - covariance).abs().max().item()
    print(f"{request.node.callspec.id}: error of the mean {errors[0]:.3f}, of the covariance {errors[1]:.3f}")
    assert max(errors) < tolerance


def exact_flow(x, first, last):
    """x at σ = `last` from x at σ = `first` along the flow, σ² = (1 - ᾱ) / ᾱ: dx̄/dσ = ε for x̄ = x / √ᾱ
    (Song et al. 2021, "Denoising Diffusion Implicit Models", equation 14), by the classical
    Runge–Kutta method in 500 steps of log σ: exact to 2·10⁻⁸."""

    def derivative(log_sigma, y):
        sigma = np.exp(log_sigma)
        return sigma * MIXTURE.epsilon(y / (1 + sigma**2) ** 0.5, 1 / (1 + sigma**2))

    y, steps = x * (1 + first**2) ** 0.5, 500
    h = (np.log(last) - np.log(first)) / steps
    for number in range(steps):
        log_sigma = np.log(first) + number * h
        k1 = derivative(log_sigma, y)
        k2 = derivative(log_sigma + h / 2, y + h / 2 * k1)
        k3 = derivative(log_sigma + h / 2, y + h / 2 * k2)
        k4 = derivative(log_sigma + h, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y / (1 + last**2) ** 0.5


@pytest.mark.parametrize(
    ("name", "order", "counts"), [("DDIM", 1, (50, 100, 200)), ("DPM-Solver++ 2M", 2, (40, 80, 160))]
)
def test_error_falls_with_the_order(name, order, counts):
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    alpha_bar = schedule.alphas_bar("linear", 1000)
    first, last = (((1 - level) / level).sqrt().item() for level in (alpha_bar[-1], alpha_bar[0]))
    exact, errors = exact_flow(x, first, last), []
    for steps in counts:
        scheduler = (
            DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False)
            if name == "DDIM"
            else DPMSolverMultistepScheduler(**LINEAR, use_lu_lambdas=True, final_sigmas_type="sigma_min")
        )
        errors.append((sample(scheduler, steps, x) - exact).abs().mean().item())
    orders = [np.log2(before / after) for before, after in pairwise(errors)]
    print(f"{name}: errors {errors} at {counts} steps, orders {orders}")
    assert all(abs(measured - order) <= 0.25 for measured in orders)
