import pytest
import torch
from torch import Tensor

from ldm.evaluation.distances import frechet_distance, gaussian_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(samples: int, dimensions: int, seed: int = 0) -> Tensor:
    """A sample whose empirical mean is 0 and whose empirical covariance is the identity, up to rounding."""
    x = normal(samples, dimensions, seed=seed)
    orthonormal, _ = torch.linalg.qr(x - x.mean(0))
    return orthonormal * (samples - 1) ** 0.5


def rotation(dimensions: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(dimensions, dimensions, seed=seed)).Q


def test_shift_adds_its_squared_length():
    x = whitened(300, 8) @ normal(8, 8, seed=1)
    shift = normal(8, seed=2)
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0])
def test_scaled_identity_covariance(scale):
    """Σ_b = s² I: tr(I + s² I - 2 s I) = F (1 - s)²."""
    a, b = whitened(200, 12, seed=3), scale * whitened(500, 12, seed=4)
    assert frechet_distance(a, b) == pytest.approx(12 * (1 - scale) ** 2, rel=1e-9)


def test_commuting_covariances():
    """With common eigenvectors the distance is the sum of (σ_a - σ_b)² over them."""
    sigma_a, sigma_b = torch.rand(2, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3
    axes = rotation(10, seed=6)
    a = whitened(150, 10, seed=7) * sigma_a @ axes.T
    b = whitened(400, 10, seed=8) * sigma_b @ axes.T + 1.5
    expected = (sigma_a - sigma_b).square().sum() + 10 * 1.5**2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_covariances_that_do_not_commute():
    """In two dimensions tr (Σ_a Σ_b)^½ = sqrt(tr(Σ_a Σ_b) + 2 sqrt(det(Σ_a Σ_b)))."""
    root_a, root_b = normal(2, 2, seed=9), normal(2, 2, seed=10)
    cov_a, cov_b = root_a @ root_a.T, root_b @ root_b.T
    product = cov_a @ cov_b
    assert not torch.allclose(product, product.T)
    overlap = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = cov_a.trace() + cov_b.trace() - 2 * overlap
    measured = frechet_distance(whitened(60, 2, seed=11) @ root_a.T, whitened(80, 2, seed=12) @ root_b.T)
    assert measured == pytest.approx(expected.item(), rel=1e-9)


def test_symmetric_and_unchanged_by_a_common_rotation():
    a, b = normal(100, 6, seed=13) @ normal(6, 6, seed=14), normal(70, 6, seed=15) + 0.3
    axes = rotation(6, seed=16)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a @ axes, b @ axes) == pytest.approx(frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("samples", [500, 40])  # 40 samples in 64 dimensions: a singular covariance
def test_zero_with_itself(samples):
    x = 10 * normal(samples, 64, seed=17)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9 * x.square().sum().item() / samples)


def test_singular_covariances():
    """Two segments at a right angle share nothing: the distance is the sum of their variances."""
    line = whitened(50, 1, seed=18)
    a, b = line * torch.tensor([2.0, 0.0]), line * torch.tensor([0.0, 3.0])
    assert frechet_distance(a, b) == pytest.approx(13, rel=1e-9)


def test_few_samples_are_biased_upwards():
    reference = normal(20_000, 16, seed=19)
    few, many = (frechet_distance(normal(n, 16, seed=20), reference) for n in (30, 3000))
    assert few > 10 * many > 0


def test_root_squares_to_the_covariance():
    x = normal(90, 5, seed=21) @ normal(5, 5, seed=22) + 4
    mean, root = gaussian_of(x)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(root, root.T)
    torch.testing.assert_close(root @ root, torch.cov(x.T))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), "features_b"),
        (torch.zeros(1, 3), torch.zeros(4, 3), "features_a"),
        (torch.zeros(4), torch.zeros(4), "features_a"),
        (torch.full((4, 3), torch.nan), torch.zeros(4, 3), "not finite"),
    ],
)
def test_refuses_what_it_cannot_measure(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
