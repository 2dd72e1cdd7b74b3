"""Log-likelihoods along the flow against a density that is known."""

import sys

import pytest
import torch

from ldm.diffusion.mixture import two_in_the_plane
from ldm.diffusion.sde import VariancePreserving
from ldm.errors import UserError
from ldm.evaluation.likelihood import log_likelihood

PROCESS = VariancePreserving(beta_max=40.0)  # ᾱ(1) = 2e-9: nothing of the data is left at t = 1
MIXTURE = two_in_the_plane()


def score(x, t):
    return MIXTURE.score(x, PROCESS.alpha_bar(t))


def test_of_a_mixture_is_exact():
    x = MIXTURE.sample(64, torch.Generator().manual_seed(1))
    error = (log_likelihood(PROCESS, score, x) - MIXTURE.log_density(x)).abs().max().item()
    print(f"largest error {error:.1e} nats")
    assert error <= 1e-3


def test_hutchinson_is_right_on_average():
    generator = torch.Generator().manual_seed(2)
    x = MIXTURE.sample(4, generator)
    probes = torch.randint(2, (256, 4, 2), generator=generator, dtype=torch.float64) * 2 - 1
    estimate = log_likelihood(PROCESS, score, x, tolerance=1e-4, probes=probes)
    assert (estimate - MIXTURE.log_density(x)).abs().max() < 0.1


def test_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(UserError, match="need SciPy; pip install"):
        log_likelihood(PROCESS, score, torch.zeros(1, 2, dtype=torch.float64))
