"""The mixture against `torch.distributions` and autograd."""

import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ldm.diffusion.mixture import two_in_the_plane

MIXTURE = two_in_the_plane()
LEVELS = torch.tensor([1.0, 0.9, 0.3, 1e-3], dtype=torch.float64)


def test_density_at_every_noise_level_is_that_of_distributions():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for point, level in zip(x, LEVELS, strict=True):
        deviations = (level * MIXTURE.deviations**2 + 1 - level).sqrt()[:, None].expand(2, 2)
        theirs = MixtureSameFamily(
            Categorical(MIXTURE.weights), Independent(Normal(level**0.5 * MIXTURE.means, deviations), 1)
        )
        torch.testing.assert_close(
            MIXTURE.log_density(point[None], level)[0], theirs.log_prob(point), rtol=1e-12, atol=0
        )


def test_score_is_the_gradient_of_the_density():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(MIXTURE.log_density(x, LEVELS).sum(), x)
    torch.testing.assert_close(MIXTURE.score(x, LEVELS), gradient, rtol=1e-12, atol=1e-14)


def test_epsilon_is_the_mean_of_the_noise():
    """By brute force: among many (x_0, ε), those that lead near a point have that ε on average."""
    generator = torch.Generator().manual_seed(2)
    x_0, noise = (
        MIXTURE.sample(2_000_000, generator),
        torch.randn(2_000_000, 2, generator=generator, dtype=torch.float64),
    )
    x_t, point = 0.6 * x_0 + 0.8 * noise, torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    near = ((x_t - point) ** 2).sum(1) < 0.05**2
    torch.testing.assert_close(noise[near].mean(0), MIXTURE.epsilon(point, 0.36)[0], atol=0.03, rtol=0)


def test_samples_have_the_moments():
    x = MIXTURE.sample(400_000, torch.Generator().manual_seed(3))
    mean, covariance = MIXTURE.moments()
    torch.testing.assert_close(x.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance, atol=0.02, rtol=0)
