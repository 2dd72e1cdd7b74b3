"""How far two sets of images are from each other, from their features (N, F) and (M, F); all in float64.

Which figure is of which paper is said at each function. What they are worth depends on the features and on how many
images there are: name both beside every figure.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.training.randomness import generator

FEW_IMAGES = 10_000
"""Below, a Fréchet distance says much of how many images there are (Heusel et al. 2017 advise at least so many)."""
NUMBERS_AT_ONCE = 2**24
"""Distances that are in memory at a time: 128 MiB."""


class Gaussian(NamedTuple):
    """What the Fréchet distance knows of a set of features."""

    mean: Tensor  # (F,)
    root: Tensor  # (F, F), the symmetric square root of the covariance


def frechet_distance(features_a: Tensor | Gaussian, features_b: Tensor | Gaussian) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of features (N, F) and (M, F), N, M ≥ 2, or of their Gaussians.

    Heusel et al. 2017, equation 6; Dowson & Landau 1982. Of an Inception's features it is the FID. Σ are unbiased
    sample covariances. The estimate is biased upwards where there are few samples, so compare only distances of equally
    many.

    Raises:
        UserError: shapes that do not match, fewer than two samples, or a feature that is not finite.
    """
    sizes = [x.root.shape[0] if isinstance(x, Gaussian) else x.shape[-1] for x in (features_a, features_b)]
    if sizes[0] != sizes[1]:
        raise UserError(f"features_b must be of {sizes[0]} numbers an image, as features_a are, got {sizes[1]}")
    mean_a, root_a = features_a if isinstance(features_a, Gaussian) else gaussian_of(features_a, "features_a")
    mean_b, root_b = features_b if isinstance(features_b, Gaussian) else gaussian_of(features_b, "features_b")
    # The eigenvalues of Σ_a Σ_b are the squared singular values of Σ_a^½ Σ_b^½. Taking these directly, rather than
    # the square roots of rounded eigenvalues, keeps singular covariances accurate.
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(0.0, distance.item())


def gaussian_of(features: Tensor, name: str = "features") -> Gaussian:
    """Of features (N, F), N ≥ 2. Made once, it spares `frechet_distance` most of its time. Raises as that does."""
    features = _checked(features, name, least=2)
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(features.T, correction=1).reshape(features.shape[1], -1))
    return Gaussian(features.mean(0), (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T)


def few_images(images: int, size: int) -> str | None:
    """What to say beside a Fréchet distance of so many images, in features of `size` numbers, where they are few."""
    if images <= size:
        return (f"{images} images cannot fill the covariance of {size} features, which is singular: the Fréchet "
                "distance is far too high; compare it only with one of as many images")  # fmt: skip
    if images < FEW_IMAGES:
        return (f"{images} images are fewer than {FEW_IMAGES}: the Fréchet distance is too high; compare it only with "
                "one of as many images")  # fmt: skip
    return None


def kernel_distance(
    features_a: Tensor, features_b: Tensor, subset_size: int, subsets: int, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets of both, of the unbiased squared maximum mean discrepancy with
    the kernel (x·y / F + 1)³.

    Bińkowski et al. 2018, §4; the estimator is equation 4 of Gretton et al. 2012. Of an Inception's features it is the
    KID, usually of 100 subsets of 1,000. Unbiased at any number of images, so that it may be below 0. Subsets are drawn
    without replacement, from `seed`.

    Raises:
        UserError: shapes that do not match, fewer images than a subset has, or a feature that is not finite.
    """
    if subset_size < 2 or subsets < 1:
        raise UserError(f"a kernel distance needs subsets of at least 2 images, got {subsets} of {subset_size}")
    a, b = _pair(features_a, features_b, least=subset_size)
    draw = generator(seed, "kernel distance")
    values = []
    for _ in range(subsets):
        x, y = (features[torch.randperm(len(features), generator=draw)[:subset_size]] for features in (a, b))
        values.append(_squared_discrepancy(x, y))
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def kernel_interval(
    value: float, real: Tensor, drawn: Tensor, rounds: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Confidence interval (low, high) of `value`, a kernel distance of `drawn` to `real`, as `bootstrap` makes them.

    Of all images rather than of subsets, whose choice would add its own chance; an image that is drawn twice does not
    meet itself. Raises as `kernel_distance` and `bootstrap` do.
    """
    real, drawn = _pair(real, drawn, least=2, names=("real", "drawn"))
    times = _times(len(drawn), _checked_rounds(rounds, level), seed).to(drawn)  # (R, N)
    among, to_real = torch.zeros(2, len(times), dtype=torch.float64, device=drawn.device)
    step = max(1, NUMBERS_AT_ONCE // max(len(real), len(drawn)))
    for start in range(0, len(drawn), step):
        part = slice(start, start + step)
        k = _kernel(drawn[part], drawn)
        k.diagonal(start).zero_()
        among += ((times[:, part] @ k) * times).sum(dim=1)
        to_real += times[:, part] @ _kernel(drawn[part], real).mean(dim=1)
    pairs = times.sum(dim=1) ** 2 - times.square().sum(dim=1)
    return _interval(value, (among / pairs - 2 * to_real / len(drawn)).cpu(), level)


def _squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    def mean_of_others(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    return mean_of_others(_kernel(x, x)) + mean_of_others(_kernel(y, y)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def neighbour_measures(real: Tensor, drawn: Tensor, k: int = 5, real_radii: Tensor | None = None) -> dict[str, float]:
    """precision, recall, density and coverage of `drawn` (N, F) against `real` (M, F), N, M > k.

    Around each image lies a ball that reaches to its k-th nearest neighbour in its own set. precision: the share of the
    drawn images that lie in a ball of a real one; recall: of the real ones in a ball of a drawn one (Kynkäänniemi et
    al. 2019, equation 1; there k = 3). density: in how many balls of real images a drawn one lies, over k; coverage:
    the share of the balls of real images with a drawn one in them (Naeem et al. 2020, equations 3 and 4; k = 5). A
    density may be above 1. All depend on N and M: compare only figures of equally many. real_radii: the real images'
    `radii`, where they are known.

    Raises:
        UserError: shapes that do not match, too few images for k, or a feature that is not finite.
    """
    real, drawn = _pair(real, drawn, least=k + 1, names=("real", "drawn"))
    times = torch.ones(1, len(drawn), dtype=torch.float64, device=drawn.device)
    values = _neighbour_measures(real, drawn, k, times, real_radii)
    return {name: value.item() for name, value in values.items()}


def neighbour_intervals(
    real: Tensor,
    drawn: Tensor,
    k: int,
    rounds: int,
    seed: int,
    level: float = 0.95,
    real_radii: Tensor | None = None,
) -> dict[str, tuple[float, float]]:
    """Confidence intervals (low, high) of `neighbour_measures`, as `bootstrap` makes them, of all rounds in one pass.

    The balls of the drawn images stay those of the whole set: an image that is drawn twice is no neighbour of itself.
    """
    real, drawn = _pair(real, drawn, least=k + 1, names=("real", "drawn"))
    times = _times(len(drawn), _checked_rounds(rounds, level), seed).to(drawn)
    values = _neighbour_measures(real, drawn, k, torch.cat([torch.ones_like(times[:1]), times]), real_radii)
    return {name: _interval(value[0].item(), value[1:].cpu(), level) for name, value in values.items()}


def radii(features: Tensor, k: int) -> Tensor:
    """Distance (N,) of each of features (N, F) to its k-th nearest other, N > k. Raises as `neighbour_measures`."""
    return _radii(_checked(features, "features", least=k + 1), k)


def _neighbour_measures(
    real: Tensor, drawn: Tensor, k: int, times: Tensor, real_radii: Tensor | None
) -> dict[str, Tensor]:
    """Each measure (R,) where drawn image j counts `times[r, j]` times in round r; times (R, N)."""
    real_radii = _radii(real, k) if real_radii is None else real_radii.to(real)
    drawn_radii = _radii(drawn, k)
    is_there = (times > 0).to(drawn)
    balls = torch.zeros(len(drawn), dtype=torch.float64, device=drawn.device)  # of real images, around each drawn one
    reached, covered = torch.zeros(2, len(times), dtype=torch.float64, device=drawn.device)
    for start, distances in _distances(real, drawn):
        in_real = (distances <= real_radii[start : start + len(distances), None]).to(drawn)
        in_drawn = (distances <= drawn_radii).to(drawn)
        balls += in_real.sum(dim=0)
        covered += (in_real @ is_there.T > 0).sum(dim=0)
        reached += (in_drawn @ is_there.T > 0).sum(dim=0)
    return {
        "precision": times @ (balls > 0).to(drawn) / len(drawn),
        "recall": reached / len(real),
        "density": times @ balls / (k * len(drawn)),
        "coverage": covered / len(real),
    }


def _radii(features: Tensor, k: int) -> Tensor:
    # `topk` takes a tenth of the time of `kthvalue`
    return torch.cat(
        [distances.topk(k + 1, dim=1, largest=False).values[:, -1] for _, distances in _distances(features, features)]
    )


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) of each of queries (N, F) to the nearest of references (M, F), and which that is (N,).

    Against the features of the training images it shows what a model has learned by heart: copies lie nearer than the
    images of a test split do.

    Raises:
        UserError: shapes that do not match, or a feature that is not finite.
    """
    queries, references = _pair(queries, references, least=1, names=("queries", "references"))
    found = [distances.min(dim=1) for _, distances in _distances(queries, references)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def bootstrap(
    measure: Callable[[Tensor], float], drawn: Tensor, rounds: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Confidence interval (low, high) of `measure(drawn)`, from resamples of the rows of drawn (N, …) with replacement.

    Efron 1979; quantiles of the resamples' deviations from their own mean, put about the measure itself. That mean is
    not used, as images that come twice push distances up and coverage down. What the real images would be, drawn anew,
    the interval does not say. Of a Fréchet distance it is wider than need be, by some 40 % for 1,000 images in 256
    features; of kernel distances and neighbours there are `kernel_interval` and `neighbour_intervals`.

    Raises:
        UserError: fewer than two rounds, or a level outside (0, 1).
    """
    values = [
        measure(drawn[_resample(len(drawn), seed, number).to(drawn.device)])
        for number in range(_checked_rounds(rounds, level))
    ]
    return _interval(measure(drawn), torch.tensor(values, dtype=torch.float64), level)


def _resample(count: int, seed: int, number: int) -> Tensor:
    return torch.randint(count, (count,), generator=generator(seed, "bootstrap", number))


def _times(count: int, rounds: int, seed: int) -> Tensor:
    """How often each image (rounds, count) is in each resample."""
    return torch.stack([_resample(count, seed, number).bincount(minlength=count) for number in range(rounds)])


def _checked_rounds(rounds: int, level: float) -> int:
    if rounds < 2:
        raise UserError(f"a bootstrap needs at least 2 rounds, got {rounds}")
    if not 0 < level < 1:
        raise UserError(f"the level of a confidence interval must be in (0, 1), got {level}")
    return rounds


def _interval(value: float, resampled: Tensor, level: float) -> tuple[float, float]:
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (value + (resampled - resampled.mean()).quantile(quantiles)).tolist()
    return low, high


def _distances(rows: Tensor, columns: Tensor):
    """Euclidean distances of some rows at a time to all columns, each with the number of its first row."""
    origin = columns.mean(dim=0)  # which costs the fewest digits
    rows, columns = rows - origin, columns - origin
    for start in range(0, len(rows), max(1, NUMBERS_AT_ONCE // len(columns))):
        part = rows[start : start + max(1, NUMBERS_AT_ONCE // len(columns))]
        yield start, torch.cdist(part, columns, compute_mode="use_mm_for_euclid_dist")


def _pair(
    a: Tensor, b: Tensor, least: int, names: tuple[str, str] = ("features_a", "features_b")
) -> tuple[Tensor, Tensor]:
    a, b = _checked(a, names[0], least), _checked(b, names[1], least)
    if a.shape[1] != b.shape[1]:
        raise UserError(f"{names[1]} must be of {a.shape[1]} numbers an image, as {names[0]} are, got {b.shape[1]}")
    return a, b.to(a.device)


def _checked(features: Tensor, name: str, least: int) -> Tensor:
    """Features (N, F) in float64. Raises UserError unless N ≥ `least` and all are finite."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(f"{name} must be (images, features), got {tuple(features.shape)}")
    if len(features) < least:
        raise UserError(f"{name} must be of at least {least} images for this measure, got {len(features)}")
    if not torch.isfinite(features).all():
        raise UserError(f"{name} holds numbers that are not finite")
    return features.double()
