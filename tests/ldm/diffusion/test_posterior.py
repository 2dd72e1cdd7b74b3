"""The forward process step by step, its posterior, and the equivalence of what a network may predict."""

import pytest
import torch

from ldm.diffusion import process, schedule

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
DOUBLE = torch.float64


@pytest.mark.parametrize("name", SCHEDULES)
def test_single_steps_compose_into_q_sample(name):
    """Mean and variance of x_t | x_0, carried through every one of T steps (Ho et al. 2020, equations 2 and 4)."""
    beta = schedule.betas(name, 1000)
    alpha_bar = schedule.alphas_bar(name, 1000)
    one, zero = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    mean, variance = one, zero
    worst = 0.0
    for t in range(1000):
        step = beta[t : t + 1]
        mean = process.q_step(mean, step, zero)  # linear in x: what it does to the mean
        gain, spread = process.q_step(one, step, zero), process.q_step(zero, step, one)
        variance = gain**2 * variance + spread**2
        at = alpha_bar[t : t + 1]
        worst = max(
            worst,
            ((mean - process.q_sample(one, at, zero)) / mean).abs().item(),
            ((variance - process.q_sample(zero, at, one) ** 2) / variance).abs().item(),
        )
    print(f"{name}: relative error {worst:.1e}")
    assert worst <= 1e-12


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [1, 10, 300, 999])
def test_posterior_is_bayes_rule_on_a_grid(name, t):
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated numerically."""
    alpha_bar = schedule.alphas_bar(name, 1000)
    step = torch.tensor([t])
    at, before = process.at_timestep(alpha_bar, step), process.before_timestep(alpha_bar, step)
    x_0, x_t = torch.tensor([0.7], dtype=DOUBLE), torch.tensor([-0.4], dtype=DOUBLE)
    mean, variance = process.q_posterior(x_0, x_t, at, before)

    width = variance.sqrt()
    grid = mean + width * torch.linspace(-12, 12, 20_001, dtype=DOUBLE)
    alpha_t = at / before
    log_density = -((x_t - alpha_t.sqrt() * grid) ** 2) / (2 * (1 - alpha_t)) - (grid - before.sqrt() * x_0) ** 2 / (
        2 * (1 - before)
    )
    weight = torch.softmax(log_density, dim=0)
    grid_mean = (weight * grid).sum()
    grid_variance = (weight * (grid - grid_mean) ** 2).sum()
    errors = ((grid_mean - mean) / width).abs().item(), (grid_variance / variance - 1).abs().item()
    print(f"{name}, t = {t}: error of the mean {errors[0]:.1e} deviations, of the variance {errors[1]:.1e}")
    assert max(errors) <= 1e-9


def test_posterior_of_the_first_timestep_is_the_image():
    alpha_bar = schedule.alphas_bar("linear", 100)
    t = torch.tensor([0, 0])
    x_0, x_t = torch.randn(2, 2, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    mean, variance = process.q_posterior(x_0, x_t, alpha_bar[t], process.before_timestep(alpha_bar, t))
    torch.testing.assert_close(mean, x_0)
    assert variance.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_predictions_convert_into_each_other_and_back(name):
    alpha_bar = schedule.alphas_bar(name, 1000)
    draw = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 1000, 4, dtype=DOUBLE, generator=draw)
    x_t = process.q_sample(x_0, alpha_bar, noise)
    worst = 0.0
    for given in process.PREDICTIONS:
        true = process.prediction_target(given, x_0, alpha_bar, noise)
        for wanted in process.PREDICTIONS:
            there = process.convert(true, given, wanted, x_t, alpha_bar)
            back = process.convert(there, wanted, given, x_t, alpha_bar)
            worst = max(worst, ((back - true).abs() / (1 + true.abs())).max().item())
    print(f"{name}: relative error {worst:.1e}")
    assert worst <= 1e-10


def test_score_is_the_gradient_of_the_log_density():
    alpha_bar_t = torch.tensor([0.3], dtype=DOUBLE)
    x_0, noise = torch.randn(2, 1, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    x_t = process.q_sample(x_0, alpha_bar_t, noise).requires_grad_()
    density = torch.distributions.Normal(alpha_bar_t.sqrt() * x_0, (1 - alpha_bar_t).sqrt())
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(process.prediction_target("score", x_0, alpha_bar_t, noise), gradient)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr(name):
    alpha_bar = schedule.alphas_bar(name, 1000)
    rescaled = schedule.zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0 and rescaled[0].item() == pytest.approx(alpha_bar[0].item())
    assert (rescaled.diff() < 0).all()
    x_0, noise = torch.randn(2, 1000, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    x_t = process.q_sample(x_0, rescaled, noise)
    v = process.velocity(x_0, rescaled, noise)
    back, _ = process.clean_and_noise(v, "v_prediction", x_t, rescaled)
    torch.testing.assert_close(back, x_0)  # v knows the image even where x_t does not


def test_log_snr():
    alpha_bar = schedule.alphas_bar("linear", 10)
    torch.testing.assert_close(schedule.log_snr(alpha_bar).exp(), schedule.snr(alpha_bar))
    torch.testing.assert_close(schedule.betas_of(alpha_bar), schedule.betas("linear", 10))


@pytest.mark.parametrize("t", [-1, 10])
def test_a_timestep_out_of_range_is_refused(t):
    alpha_bar = schedule.alphas_bar("linear", 10)
    for reads in (process.at_timestep, process.before_timestep):
        with pytest.raises(ValueError, match=rf"t must be in 0 … 9, got {t}"):
            reads(alpha_bar, torch.tensor([3, t]))


def test_an_unknown_prediction_is_refused():
    x = torch.zeros(1, 2)
    for call in (
        lambda: process.prediction_target("noise", x, torch.tensor([0.5]), x),
        lambda: process.convert(x, "noise", "sample", x, torch.tensor([0.5])),
        lambda: process.convert(x, "sample", "noise", x, torch.tensor([0.5])),
    ):
        with pytest.raises(ValueError, match=r"prediction_type must be one of .*got 'noise'"):
            call()
