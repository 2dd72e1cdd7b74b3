"""The SDE against closed forms of Gaussians and of a mixture whose score is known."""

import pytest
import torch

from ldm.diffusion import schedule, sde
from ldm.diffusion.mixture import two_in_the_plane

DOUBLE = torch.float64
PROCESS = sde.VariancePreserving(beta_max=40.0)  # ᾱ(1) = 2e-9: nothing of the data is left at t = 1
MIXTURE = two_in_the_plane()


def score(x, t):
    return MIXTURE.score(x, PROCESS.alpha_bar(t))


def test_is_the_limit_of_the_linear_schedule():
    """β of N steps is β(t) / N (Song et al. 2021, appendix B): N = 1000 gives DDPM's 1e-4 … 0.02."""
    t = torch.arange(1, 1001, dtype=DOUBLE) / 1000
    alpha_bar = sde.VariancePreserving().alpha_bar(t)
    torch.testing.assert_close(alpha_bar, schedule.alphas_bar("linear", 1000), atol=5e-3, rtol=0)


def test_alpha_bar_is_the_integral_of_beta():
    t = torch.linspace(0, 1, 10_001, dtype=DOUBLE)
    integral = torch.cumulative_trapezoid(PROCESS.beta(t), t)
    torch.testing.assert_close(-PROCESS.alpha_bar(t)[1:].log(), integral, rtol=1e-9, atol=1e-12)


def test_ornstein_uhlenbeck_paths_have_their_covariance():
    """With constant β, from stationarity, Cov(x_s, x_t) = exp(-β |t - s| / 2)."""
    process = sde.VariancePreserving(4.0, 4.0)
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=DOUBLE)
    x = torch.randn(200_000, generator=generator, dtype=DOUBLE)
    path = sde.forward_path(process, x, times, generator)
    expected = torch.exp(-2.0 * (times[:, None] - times).abs())
    torch.testing.assert_close(path @ path.T / 200_000, expected, atol=0.01, rtol=0)


def test_hutchinson_estimates_the_divergence_without_bias():
    x, t = MIXTURE.sample(32, torch.Generator().manual_seed(2)), torch.full((32,), 0.3, dtype=DOUBLE)

    def drift(y):
        return sde.flow_drift(PROCESS, score, y, t)

    value, exact = sde.divergence(drift, x)
    torch.testing.assert_close(value, drift(x).detach())
    generator = torch.Generator().manual_seed(0)
    probes = torch.randint(2, (2000, 32, 2), generator=generator, dtype=DOUBLE) * 2 - 1
    _, estimate = sde.divergence(drift, x, probes)
    single = torch.stack([sde.divergence(drift, x, probe[None])[1] for probe in probes[:50]])
    assert (single - exact).abs().max() > 1e-3  # one probe alone is no exact divergence
    assert (estimate - exact).abs().max() < 0.1 * single.std(dim=0).max() + 1e-6


def test_reverse_sde_returns_to_the_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20_000, 2, generator=generator, dtype=DOUBLE)
    times = torch.linspace(1, 0, 501, dtype=DOUBLE)
    samples = sde.euler_maruyama(PROCESS, score, x, times, generator)
    mean, covariance = MIXTURE.moments()
    errors = (samples.mean(0) - mean).abs().max().item(), (samples.T.cov() - covariance).abs().max().item()
    print(f"error of the mean {errors[0]:.3f}, of the covariance {errors[1]:.3f}")
    assert max(errors) < 0.05
    # and not only in its moments: the share of the smaller heap
    heap = ((samples - MIXTURE.means[0]).norm(dim=1) < (samples - MIXTURE.means[1]).norm(dim=1)).double().mean()
    assert heap.item() == pytest.approx(0.3, abs=0.02)


def test_flow_keeps_the_marginals():
    """A sample carried by the flow from t = 0 to 1 has the density that the forward process has there: a normal's."""
    x = MIXTURE.sample(20_000, torch.Generator().manual_seed(4))
    for t in torch.linspace(0, 1, 401, dtype=DOUBLE)[:-1]:
        x = x + sde.flow_drift(PROCESS, score, x, t.expand(len(x))) / 400
    assert x.mean(0).abs().max() < 0.03
    torch.testing.assert_close(x.T.cov(), torch.eye(2, dtype=DOUBLE), atol=0.04, rtol=0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.0, 2.0), (float("nan"), 1.0)])
def test_rates_that_cannot_be_are_refused(low, high):
    with pytest.raises(ValueError, match="beta_min must be in"):
        sde.VariancePreserving(low, high)
