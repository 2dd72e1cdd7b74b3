"""Denoising, sparse and k-sparse autoencoders: what each adds to the plain one."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from ldm.autoencoders.corruption import add_noise, mask
from ldm.autoencoders.k_sparse import keep_largest
from ldm.autoencoders.sparse import bernoulli_kl, sparsity_penalty

DOUBLE = torch.float64


@pytest.mark.parametrize(("proportion", "gone"), [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_a_fixed_proportion_is_masked_at_random_places(proportion, gone):
    x = torch.ones(200, 2, 10)
    masked = mask(x, proportion, torch.rand(x.shape, generator=torch.Generator().manual_seed(0)))
    assert ((masked == 0).flatten(1).sum(1) == gone).all()
    assert masked.mean().item() == pytest.approx(1 - proportion)
    assert (masked.mean(0) - (1 - proportion)).abs().max() < 0.2  # no place is favoured


def test_noise_has_its_deviation():
    x, noise = torch.zeros(4, 5), torch.ones(4, 5)
    assert torch.equal(add_noise(x, 0.3, noise), torch.full((4, 5), 0.3))


@pytest.mark.parametrize("rho", [0.05, 0.25, 0.9])
def test_bernoulli_kl_is_that_of_distributions(rho):
    rho_hat = torch.linspace(0.01, 0.99, 99, dtype=DOUBLE)
    theirs = kl_divergence(Bernoulli(torch.tensor(rho, dtype=DOUBLE)), Bernoulli(rho_hat))
    torch.testing.assert_close(bernoulli_kl(rho, rho_hat), theirs, rtol=1e-10, atol=1e-12)
    assert bernoulli_kl(rho, torch.tensor(rho, dtype=DOUBLE)).item() == pytest.approx(0, abs=1e-15)


def test_penalty_sums_layers_and_units_of_batch_means():
    layers = [torch.tensor([[0.1, 0.9], [0.3, 0.5]], dtype=DOUBLE), torch.tensor([[0.6], [0.2]], dtype=DOUBLE)]
    by_hand = sum(0.25 * math.log(0.25 / m) + 0.75 * math.log(0.75 / (1 - m)) for m in (0.2, 0.7, 0.4))
    assert sparsity_penalty(layers, 0.25).item() == pytest.approx(by_hand)


def test_exactly_k_are_kept_and_carry_the_gradient():
    code = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for k in (1, 7, 30):
        kept = keep_largest(code, k)
        assert ((kept != 0).sum(1) == k).all()
        torch.testing.assert_close(kept.sum(1), code.topk(k, dim=1).values.sum(1))
        (gradient,) = torch.autograd.grad(kept.sum(), code)
        assert torch.equal(gradient, (kept != 0).float())


def test_ties_do_not_add_to_k():
    assert (keep_largest(torch.ones(3, 8), 5) != 0).sum(1).tolist() == [5, 5, 5]


def test_what_cannot_be_is_refused():
    x = torch.zeros(2, 4)
    for call, said in (
        (lambda: mask(x, 1.5, x), r"proportion must be in \[0, 1\], got 1.5"),
        (lambda: add_noise(x, -1, x), "deviation must be >= 0, got -1"),
        (lambda: bernoulli_kl(1.0, x + 0.5), r"rho must be in \(0, 1\), got 1"),
        (lambda: bernoulli_kl(0.2, x + 1.5), r"rho_hat must be in \[0, 1\], got 1.5"),
        (lambda: keep_largest(x, 5), "k must be in 1 … 4.*got 5"),
        (lambda: keep_largest(x, 0), "k must be in 1 … 4.*got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
