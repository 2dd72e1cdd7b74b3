"""Distances against closed forms and properties; against other implementations in test_against_others.py."""

import pytest
import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation import distances
from ldm.evaluation.distances import (
    bootstrap,
    few_images,
    frechet_distance,
    gaussian_of,
    kernel_distance,
    kernel_interval,
    nearest,
    neighbour_intervals,
    neighbour_measures,
)


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
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)


def test_a_gaussian_stands_for_its_features():
    a, b = normal(40, 5, seed=23), normal(60, 5, seed=24) + 1
    assert frechet_distance(gaussian_of(a), b) == frechet_distance(a, gaussian_of(b)) == frechet_distance(a, b)


@pytest.mark.parametrize(
    ("images", "size", "said"),
    [(256, 256, "singular"), (257, 256, "too high"), (9_999, 2048, "too high"), (10_000, 2048, None)],
)
def test_warns_of_few_images(images, size, said):
    warning = few_images(images, size)
    assert (warning is None) if said is None else (said in warning and str(images) in warning)


def test_kernel_distance_of_two_points_by_hand():
    """k = (x·y / F + 1)³ with F = 1: k(0, ·) = 1, k(1, 1) = 8, so that the estimate is 1 + 8 - 2 · 1."""
    a, b = torch.zeros(2, 1), torch.ones(2, 1)
    assert kernel_distance(a, b, subset_size=2, subsets=3, seed=0) == pytest.approx((7.0, 0.0))


def test_kernel_distance_is_unbiased_and_keyed():
    a, b = normal(400, 4, seed=25), normal(400, 4, seed=26)
    mean, spread = kernel_distance(a, b, subset_size=40, subsets=100, seed=1)
    assert abs(mean) < spread
    assert kernel_distance(a, b, 40, 100, seed=1) == (mean, spread) != kernel_distance(a, b, 40, 100, seed=2)


def on_a_line(*points: float) -> Tensor:
    return torch.tensor(points)[:, None]


def test_neighbour_measures_by_hand():
    """k = 1. The balls of 0, 1, 5 reach 1, 1 and 4; those of 0.5, 9.5, 20 reach 9, 9 and 10.5. Drawn 0.5 lies in two
    balls, 9.5 and 20 in none; all real ones lie in the ball of 0.5; the balls of 0 and 1 hold a drawn one."""
    measured = neighbour_measures(on_a_line(0, 1, 5), on_a_line(0.5, 9.5, 20), k=1)
    assert measured == pytest.approx({"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 2 / 3})


def test_neighbour_measures_of_one_distribution_and_of_two_apart():
    real, drawn = normal(300, 4, seed=27), normal(300, 4, seed=28)
    same, apart = neighbour_measures(real, drawn, k=5), neighbour_measures(real, drawn + 100, k=5)
    assert same["precision"] > 0.9 and same["recall"] > 0.9 and same["coverage"] > 0.9
    assert same["density"] == pytest.approx(1, abs=0.15)
    assert apart == dict.fromkeys(apart, 0.0)


def test_a_model_that_draws_one_image_has_precision_and_no_recall():
    real = normal(200, 4, seed=29)
    measured = neighbour_measures(real, real.mean(0) + 1e-3 * normal(200, 4, seed=30), k=3)
    assert measured["precision"] == 1 and measured["recall"] < 0.05 and measured["coverage"] < 0.3


def test_chunks_make_no_difference(monkeypatch):
    real, drawn = normal(53, 3, seed=31), normal(47, 3, seed=32)
    whole = neighbour_measures(real, drawn, 3), nearest(drawn, real)[1].tolist()
    monkeypatch.setattr(distances, "NUMBERS_AT_ONCE", 500)
    assert (neighbour_measures(real, drawn, 3), nearest(drawn, real)[1].tolist()) == whole


def test_nearest_finds_copies():
    references = normal(50, 6, seed=33)
    queries = torch.cat([references[[7, 31]], references[[4]] + 3])
    found, which = nearest(queries, references)
    assert which[:2].tolist() == [7, 31]
    assert found[:2].max() < 1e-6
    torch.testing.assert_close(found[2], (queries[2] - references).norm(dim=1).min())


def test_bootstrap_of_a_mean_is_the_normal_interval():
    """Of 400 numbers with standard deviation 1: ± 1.96 / 20."""
    x = whitened(400, 1, seed=34) + 5
    low, high = bootstrap(lambda sample: sample.mean().item(), x, rounds=2000, seed=1)
    assert (low, high) == pytest.approx((5 - 1.96 / 20, 5 + 1.96 / 20), abs=0.006)
    assert bootstrap(lambda sample: sample.mean().item(), x, rounds=2000, seed=1) == (low, high)
    narrow = bootstrap(lambda sample: sample.mean().item(), x, rounds=2000, seed=1, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_bootstrap_of_a_distance_holds_the_distance():
    """Resamples are further off than the sample itself, which must not push the interval off it."""
    real, drawn = normal(500, 24, seed=35), normal(100, 24, seed=36)
    reference = gaussian_of(real)
    low, high = bootstrap(lambda sample: frechet_distance(reference, sample), drawn, rounds=50, seed=0)
    assert low < frechet_distance(real, drawn) < high


def test_intervals_of_neighbour_measures():
    """Of the precision, a mean over the drawn images, the same as `bootstrap` of its indicators."""
    real, drawn = normal(150, 3, seed=37), 1.5 * normal(120, 3, seed=38)
    measured, intervals = neighbour_measures(real, drawn, 3), neighbour_intervals(real, drawn, 3, rounds=200, seed=4)
    assert intervals.keys() == measured.keys()
    assert all(low < measured[name] < high for name, (low, high) in intervals.items())
    radii = torch.cdist(real, real).kthvalue(4, dim=1).values
    indicators = (torch.cdist(drawn, real) <= radii).any(dim=1).double()
    expected = bootstrap(lambda sample: sample.mean().item(), indicators, rounds=200, seed=4)
    assert intervals["precision"] == pytest.approx(expected)


def test_interval_of_the_kernel_distance(monkeypatch):
    """As wide, on average, as the distances of other draws are spread: 95 % within 1.96 standard deviations."""
    real, draws = normal(300, 4, seed=39), [1.3 * normal(300, 4, seed=100 + number) for number in range(60)]
    values = [kernel_distance(drawn, real, 300, 1, 0)[0] for drawn in draws]
    intervals = [kernel_interval(values[number], real, draws[number], rounds=100, seed=0) for number in range(20)]
    assert all(low < value < high for value, (low, high) in zip(values, intervals, strict=False))
    width = sum(high - low for low, high in intervals) / 20
    assert width == pytest.approx(2 * 1.96 * torch.tensor(values).std().item(), rel=0.3)
    monkeypatch.setattr(distances, "NUMBERS_AT_ONCE", 7 * 300)
    assert kernel_interval(values[0], real, draws[0], rounds=100, seed=0) == pytest.approx(intervals[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(torch.zeros(9, 2), torch.zeros(10, 2), 10, 1, 0), "features_a .* at least 10.* got 9"),
        (lambda: kernel_distance(torch.zeros(9, 2), torch.zeros(9, 3), 5, 1, 0), "features_b must be of 2 .* got 3"),
        (lambda: kernel_distance(torch.zeros(9, 2), torch.zeros(9, 2), 1, 1, 0), "subsets of at least 2"),
        (lambda: neighbour_measures(torch.zeros(9, 2), torch.zeros(5, 2), 5), "drawn .* at least 6 .* got 5"),
        (lambda: neighbour_measures(torch.full((9, 2), torch.inf), torch.zeros(9, 2), 5), "real .* not finite"),
        (lambda: neighbour_intervals(torch.zeros(9, 2), torch.zeros(9, 2), 5, 1, 0), "at least 2 rounds, got 1"),
        (lambda: nearest(torch.zeros(3, 2), torch.zeros(0, 2)), "references .* at least 1"),
        (lambda: bootstrap(lambda x: 0.0, torch.zeros(3, 2), 5, 0, level=95), r"in \(0, 1\), got 95"),
    ],
)
def test_refuses_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
