"""The bound against distributions' own formulas and against a density that is known."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.diffusion import schedule
from ldm.diffusion import variational_bound as vb
from ldm.diffusion.process import before_timestep, prediction_target, q_posterior, q_sample

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_normal_kl_is_that_of_distributions():
    mean_1, log_variance_1, mean_2, log_variance_2 = randn(4, 50)
    ours = vb.normal_kl(mean_1, log_variance_1, mean_2, log_variance_2)
    theirs = kl_divergence(Normal(mean_1, (log_variance_1 / 2).exp()), Normal(mean_2, (log_variance_2 / 2).exp()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("deviation", [0.003, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.2, 0.1, 0.97])
def test_the_grey_levels_masses_are_those_of_the_normal_and_sum_to_one(mean, deviation):
    levels = torch.arange(256, dtype=DOUBLE) / 127.5 - 1
    ours = vb.discretised_log_likelihood(
        levels, torch.full_like(levels, mean), torch.full_like(levels, 2 * math.log(deviation))
    )
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-12)
    edges = torch.cat([torch.tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])])
    masses = Normal(torch.tensor(mean, dtype=DOUBLE), torch.tensor(deviation, dtype=DOUBLE)).cdf(edges).diff()
    seen = masses > 1e-9  # a difference of cdfs is exact only where it is not tiny
    assert seen.any()
    torch.testing.assert_close(ours[seen].exp(), masses[seen], rtol=1e-6, atol=0)


def test_far_tails_keep_a_finite_value_and_gradient():
    x = torch.tensor([-1.0, 1.0, 0.0, 1.0], dtype=DOUBLE)
    mean = torch.tensor([1.0, -1.0, 5.0, 1.0], dtype=DOUBLE, requires_grad=True)
    log_variance = torch.full((4,), -9.0, dtype=DOUBLE, requires_grad=True)
    value = vb.discretised_log_likelihood(x, mean, log_variance)
    value.sum().backward()
    assert torch.isfinite(value).all() and value[0] < -1000
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_variance.grad).all()


def test_values_that_are_no_image_are_refused():
    with pytest.raises(ValueError, match=r"x must be in \[-1, 1\], got 1.5"):
        vb.discretised_log_likelihood(torch.tensor([0.0, 1.5]), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_the_bound_of_a_gaussian_is_its_entropy(name):
    """Data N(0.3, 0.5²) and the network that is optimal for it: nothing but discretisation is lost.

    Every term is a quadratic of x_0 and ε, whose mean three nodes of Gauss and Hermite for each give exactly.
    """
    centre, deviation, T = 0.3, 0.5, 1000
    alpha_bar = schedule.alphas_bar(name, T)
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(3))
    weights = weights / weights.sum()
    x_0, noise = (nodes.repeat_interleave(3) * deviation + centre).repeat(T), nodes.repeat(3 * T)
    t = torch.arange(T).repeat_interleave(9)
    a = alpha_bar[t]
    x_t = q_sample(x_0[:, None], a, noise[:, None])
    optimal = (1 - a).sqrt() * (x_t[:, 0] - a.sqrt() * centre) / (a * deviation**2 + 1 - a)  # E[ε | x_t]
    terms = vb.bound_term(
        optimal[:, None], x_0[:, None], x_t, t, alpha_bar, "epsilon", "fixed_large", vb.gaussian_log_likelihood
    )
    last = vb.prior_term(nodes[:, None] * deviation + centre, alpha_bar)
    bound = (weights @ last + weights @ terms.view(T, 3, 3).sum(0) @ weights).item()
    entropy = Normal(centre, deviation).entropy().item() / math.log(2)
    print(f"{name}: bound {bound:.5f}, entropy {entropy:.5f}, gap {bound - entropy:.5f} bits/dim")
    assert 0 <= bound - entropy <= 0.005


@pytest.mark.parametrize("kind", vb.VARIANCES)
def test_the_whole_bound_is_the_sum_of_its_terms(kind):
    alpha_bar = schedule.alphas_bar("linear", 20)
    x_0 = randn(3, 2, 4).clamp(-1, 1)
    network = lambda x, t: torch.sin(3 * x + t.view(-1, 1, 1)).repeat(1, 1 + (kind == vb.LEARNED), 1)  # noqa: E731
    drawn, expected = torch.Generator().manual_seed(1), vb.prior_term(x_0, alpha_bar)
    for step in reversed(range(20)):
        t = torch.full((3,), step)
        x_t = q_sample(x_0, alpha_bar[t], torch.randn(x_0.shape, dtype=DOUBLE, generator=drawn))
        expected = expected + vb.bound_term(network(x_t, t), x_0, x_t, t, alpha_bar, "v_prediction", kind)
    ours = vb.variational_bound(network, x_0, alpha_bar, "v_prediction", torch.Generator().manual_seed(1), kind)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_a_term_is_the_divergence_of_posterior_and_model():
    alpha_bar = schedule.alphas_bar("linear", 50)
    x_0, noise, output = randn(3, 4, 2, 3, seed=2).clamp(-1, 1)
    t = torch.tensor([1, 7, 20, 49])
    x_t = q_sample(x_0, alpha_bar[t], noise)
    mean, variance = q_posterior(x_0, x_t, alpha_bar[t], before_timestep(alpha_bar, t))
    mean_hat, _ = q_posterior(output, x_t, alpha_bar[t], before_timestep(alpha_bar, t))
    beta = schedule.betas("linear", 50)[t].view(-1, 1, 1)
    for kind, model_variance in (("fixed_small", variance), ("fixed_large", beta)):
        exact = kl_divergence(Normal(mean, variance.sqrt()), Normal(mean_hat, model_variance.sqrt()))
        ours = vb.bound_term(output, x_0, x_t, t, alpha_bar, "sample", kind)
        torch.testing.assert_close(ours, exact.flatten(1).mean(1) / math.log(2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_a_term_is_a_weighted_error_of_the_noise_and_a_constant(kind):
    alpha_bar = schedule.alphas_bar("linear", 50)
    x_0, noise, error = randn(3, 4, 2, 3, seed=2).clamp(-1, 1)
    t = torch.tensor([1, 7, 20, 49])
    x_t = q_sample(x_0, alpha_bar[t], noise)
    terms = [vb.bound_term(noise + e, x_0, x_t, t, alpha_bar, "epsilon", kind) for e in (error, 0 * error)]
    weighted = vb.epsilon_weights(alpha_bar, kind)[t] * (error**2).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(terms[0] - terms[1], weighted, rtol=1e-9, atol=1e-12)


def test_terms_in_single_precision_are_those_in_double():
    """1 - ᾱ_t and 1 - α_t, which float32 would leave few digits of, are taken in the schedule's float64."""
    alpha_bar = schedule.alphas_bar("squaredcos_cap_v2", 4000)
    t = torch.tensor([0, 1, 5, 20, 400, 2000])
    x_0, noise, error = torch.randn(3, len(t), 3, 64, generator=torch.Generator().manual_seed(0))
    x_0 = x_0.clamp(-1, 1)
    single, double = (
        vb.bound_term(ε + 0.1 * e, x, q_sample(x, alpha_bar[t], ε), t, alpha_bar, "epsilon", "fixed_large")
        for x, ε, e in ((x_0, noise, error), (x_0.double(), noise.double(), error.double()))
    )
    torch.testing.assert_close(single.double(), double, rtol=2e-4, atol=0)


def test_the_first_term_is_the_decoders():
    alpha_bar = schedule.alphas_bar("linear", 50)
    x_0 = (torch.arange(6, dtype=DOUBLE) / 127.5 - 1).view(1, 2, 3)
    x_t, t = q_sample(x_0, alpha_bar[:1], randn(1, 2, 3)), torch.tensor([0])
    log_variance = vb.clipped_posterior_variance(alpha_bar)[:1].log().view(1, 1, 1).expand_as(x_0)
    exact = -vb.discretised_log_likelihood(x_0, x_0 * 0.9, log_variance)
    ours = vb.bound_term(x_0 * 0.9, x_0, x_t, t, alpha_bar, "sample")
    torch.testing.assert_close(ours, exact.flatten(1).mean(1) / math.log(2))


def test_prior_term():
    alpha_bar = schedule.alphas_bar("linear", 20)
    x_0 = randn(3, 5)
    exact = kl_divergence(
        Normal(alpha_bar[-1].sqrt() * x_0, (1 - alpha_bar[-1]).sqrt()), Normal(torch.zeros_like(x_0), 1.0)
    )
    torch.testing.assert_close(vb.prior_term(x_0, alpha_bar), exact.mean(1) / math.log(2), rtol=1e-10, atol=0)


def test_learned_variance_lies_between_the_fixed_ones():
    alpha_bar = schedule.alphas_bar("linear", 50)
    small, large = vb.clipped_posterior_variance(alpha_bar), schedule.betas("linear", 50)
    for said, between in ((-1.0, small), (1.0, large), (0.0, (small * large).sqrt())):
        ours = vb.log_variance(vb.LEARNED, torch.full((50,), said, dtype=DOUBLE), large, small)
        torch.testing.assert_close(ours.exp(), between)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_hybrid_loss_reaches_the_mean_through_the_simple_loss_alone(kind):
    alpha_bar = schedule.alphas_bar("linear", 50)
    t = torch.tensor([0, 5, 20, 49])
    x_0 = (randn(4, 2, 3, seed=3) / 3).clamp(-1, 1)
    noise = randn(4, 2, 3, seed=4)
    output = randn(4, 4, 3, seed=5).requires_grad_()
    x_t = q_sample(x_0, alpha_bar[t], noise)
    target = prediction_target(kind, x_0, alpha_bar[t], noise)
    vb.hybrid_loss(output, x_0, x_t, target, t, alpha_bar, kind).sum().backward()
    alone = output.detach().clone().requires_grad_()
    ((alone[:, :2] - target) ** 2).flatten(1).mean(dim=1).sum().backward()
    assert torch.equal(output.grad[:, :2], alone.grad[:, :2])
    assert (output.grad[:, 2:].abs() > 0).all()


def test_the_decoder_of_latents_is_a_normal_density():
    x, mean, log_variance = randn(5, seed=1), randn(5, seed=2), randn(5, seed=3)
    theirs = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(x)
    torch.testing.assert_close(vb.gaussian_log_likelihood(x, mean, log_variance), theirs, rtol=1e-12, atol=1e-14)


def test_what_cannot_be_is_refused():
    alpha_bar, x = schedule.alphas_bar("linear", 10), torch.zeros(1, 2, 3, dtype=DOUBLE)
    t = torch.tensor([3])
    with pytest.raises(ValueError, match="output must have 4 channels with variance 'learned_range', got 2"):
        vb.bound_term(x, x, x, t, alpha_bar, "epsilon", vb.LEARNED)
    with pytest.raises(ValueError, match="output must have 2 channels with variance 'fixed_small', got 4"):
        vb.bound_term(torch.cat([x, x], 1), x, x, t, alpha_bar, "epsilon")
    with pytest.raises(ValueError, match=r"variance must be one of .*got 'fixed'"):
        vb.bound_term(x, x, x, t, alpha_bar, "epsilon", "fixed")
    with pytest.raises(ValueError, match="t must be in 0 … 9, got 10"):
        vb.bound_term(x, x, x, t + 7, alpha_bar, "epsilon")
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        vb.bound_term(x, x, x, t, alpha_bar, "noise")
