"""The VAE's terms against torch's distributions, and its bounds against a likelihood that is known."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from ldm.autoencoders import variational as vae

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_kl_and_samples_are_those_of_distributions():
    mean, logvar = randn(2, 6, 2, 5)
    posterior = Normal(mean, (logvar / 2).exp())
    theirs = kl_divergence(posterior, Normal(torch.zeros_like(mean), 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(vae.kl_to_standard_normal(mean, logvar), theirs, rtol=1e-10, atol=0)
    z = vae.reparameterise(mean, logvar, randn(20_000, 6, 2, 5, seed=1))
    torch.testing.assert_close(z.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(z.std(0), posterior.scale, rtol=0.03, atol=0)


def test_likelihoods_are_those_of_distributions():
    x, mean, logvar = randn(3, 4, 3, 2)
    theirs = Normal(mean, (logvar / 2).exp()).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(vae.gaussian_log_likelihood(x, mean, logvar), theirs, rtol=1e-10, atol=0)
    fixed = Normal(mean, 0.1).log_prob(x).flatten(1).sum(1)
    ours = vae.gaussian_log_likelihood(x, mean, torch.tensor(2 * math.log(0.1), dtype=DOUBLE))
    torch.testing.assert_close(ours, fixed, rtol=1e-10, atol=0)
    bits = (x > 0).double()
    theirs = Bernoulli(logits=mean).log_prob(bits).flatten(1).sum(1)
    torch.testing.assert_close(vae.bernoulli_log_likelihood(bits, mean), theirs, rtol=1e-10, atol=0)


def test_bounds_of_a_linear_gaussian_model():
    """x = W z + noise: log p(x) is known; a posterior that is off leaves a gap, which more samples close."""
    weights, noise = randn(5, 2, seed=2), 0.5
    x = randn(300, 2, seed=3) @ weights.T + noise * randn(300, 5, seed=4)
    covariance = weights @ weights.T + noise**2 * torch.eye(5, dtype=DOUBLE)
    exact = MultivariateNormal(torch.zeros(5, dtype=DOUBLE), covariance).log_prob(x)

    precision = weights.T @ weights / noise**2 + torch.eye(2, dtype=DOUBLE)
    mean = x @ weights @ precision.inverse() / noise**2 + 0.1
    logvar = 0.3 - precision.diagonal().log().expand_as(mean)
    draws = vae.reparameterise(mean, logvar, randn(4096, 300, 2, seed=5))
    level = torch.tensor(2 * math.log(noise), dtype=DOUBLE)
    log_likelihoods = vae.gaussian_log_likelihood(
        x.expand(4096, -1, -1).flatten(0, 1), (draws @ weights.T).flatten(0, 1), level
    ).view(4096, 300)

    bound = vae.elbo(log_likelihoods.mean(0), vae.kl_to_standard_normal(mean, logvar)).mean()
    bounds = [bound.item()]
    for count in (1, 8, 64, 4096):
        groups = 4096 // count
        ours = [
            vae.importance_weighted_bound(
                log_likelihoods[g * count : (g + 1) * count], draws[g * count : (g + 1) * count], mean, logvar
            ).mean()
            for g in range(min(groups, 512))
        ]
        bounds.append(torch.stack(ours).mean().item())
    elbo, one, *more = bounds
    print(f"ELBO {elbo:.4f}, K = 1 … 4096: {one:.4f} {more}, exact {exact.mean():.4f}")
    assert one == pytest.approx(elbo, abs=0.01)
    assert one < more[0] < more[1] < more[2]
    assert elbo < exact.mean().item() - 0.05 and more[2] == pytest.approx(exact.mean().item(), abs=0.005)


def test_beta_weighs_the_kl():
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert vae.elbo(one, two).item() == -1 and vae.elbo(one, two, beta=4.0).item() == -7


def test_bits_per_dim():
    """A uniform density on [0, 1]^d of 256 grey levels costs 8 bits each."""
    assert vae.bits_per_dim(torch.tensor(0.0), 64, levels=256).item() == 8
    assert vae.bits_per_dim(torch.tensor(-64 * math.log(2)), 64).item() == pytest.approx(1)


def test_what_cannot_be_is_refused():
    for call, said in (
        (lambda: vae.bernoulli_log_likelihood(torch.tensor([[1.2]]), torch.zeros(1, 1)), r"in \[0, 1\].*got 1.2"),
        (lambda: vae.gaussian_log_likelihood(torch.tensor([[math.nan]]), torch.zeros(1, 1), torch.zeros(1)), "finite"),
        (lambda: vae.elbo(torch.zeros(1), torch.zeros(1), beta=-1), "beta must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
