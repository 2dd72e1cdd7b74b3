"""A mixture of round Gaussians, whose score is known at every noise level: data for which the "network" is exact."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """Σ_k w_k N(μ_k, s_k² I): weights w (K,), means μ (K, D), deviations s (K,).

    x_t = √ᾱ x_0 + √(1 - ᾱ) ε is such a mixture too, of means √ᾱ μ_k and variances ᾱ s_k² + 1 - ᾱ. Every `alpha_bar`
    below is (B,), or one number for the batch; 1 is the data.
    """

    weights: Tensor
    means: Tensor
    deviations: Tensor

    def log_density(self, x: Tensor, alpha_bar: Tensor | float = 1.0) -> Tensor:
        """log p_t(x) (B,) in nats of x (B, D)."""
        away, variance = self._parts(x, alpha_bar)
        squares = (away**2).sum(dim=0) / variance
        logits = self.weights.log()[:, None] - 0.5 * (squares + x.shape[1] * (2 * torch.pi * variance).log())
        return torch.logsumexp(logits, dim=0)

    def score(self, x: Tensor, alpha_bar: Tensor | float = 1.0) -> Tensor:
        """∇ log p_t(x) (B, D)."""
        away, variance = self._parts(x, alpha_bar)
        logits = self.weights.log()[:, None] - 0.5 * ((away**2).sum(dim=0) / variance + x.shape[1] * variance.log())
        return -(torch.softmax(logits, dim=0) / variance * away).sum(dim=1).T

    def epsilon(self, x: Tensor, alpha_bar: Tensor | float) -> Tensor:
        """E[ε | x_t] (B, D) = -√(1 - ᾱ) ∇ log p_t(x_t): what a perfect ε_θ would predict."""
        level = torch.as_tensor(alpha_bar, dtype=x.dtype).reshape(-1, 1)
        return -(1 - level).sqrt() * self.score(x, alpha_bar)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, D) of the data."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self.deviations[chosen, None] * noise

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the data."""
        mean = self.weights @ self.means
        between = torch.einsum("k,ki,kj->ij", self.weights, self.means - mean, self.means - mean)
        return mean, between + (self.weights @ self.deviations**2) * torch.eye(len(mean), dtype=mean.dtype)

    def _parts(self, x: Tensor, alpha_bar: Tensor | float) -> tuple[Tensor, Tensor]:
        """x_t - √ᾱ μ_k (D, K, B), and the variances (K, B or 1): sums over leading axes are the fast ones."""
        level = torch.as_tensor(alpha_bar, dtype=x.dtype).reshape(-1)
        away = x.T[:, None] - level.sqrt() * self.means.T[..., None]
        return away, level * self.deviations[:, None] ** 2 + 1 - level


def two_in_the_plane() -> GaussianMixture:
    """The example of tests and figures, in float64: unequal weights and widths, so that nothing cancels."""
    return GaussianMixture(
        weights=torch.tensor([0.3, 0.7], dtype=torch.float64),
        means=torch.tensor([[-1.0, 0.5], [1.5, -0.5]], dtype=torch.float64),
        deviations=torch.tensor([0.3, 0.5], dtype=torch.float64),
    )
