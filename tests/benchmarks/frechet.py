"""The Fréchet distance between two clouds of features, each taken as a Gaussian."""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of features (N, F) and (M, F), N, M ≥ 2; computed in float64.

    Heusel et al. 2017, equation 6; Dowson & Landau 1982. Σ are unbiased sample covariances. The estimate is biased
    upwards where there are few samples, so compare only distances of equally many.

    Raises:
        ValueError: shapes that do not match, fewer than two samples, or a feature that is not finite.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[1]:
            raise ValueError(f"{name} must be (N >= 2, {features_a.shape[-1]}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    mean_a, root_a = mean_and_root(features_a)
    mean_b, root_b = mean_and_root(features_b)
    # The eigenvalues of Σ_a Σ_b are the squared singular values of Σ_a^½ Σ_b^½. Taking these directly, rather than
    # the square roots of rounded eigenvalues, keeps singular covariances accurate.
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(0.0, distance.item())


def mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and the symmetric square root (F, F) of the covariance of features (N, F), in float64."""
    features = features.double()
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(features.T, correction=1).reshape(features.shape[1], -1))
    return features.mean(0), (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T
