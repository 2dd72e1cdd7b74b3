"""Diffusion in continuous time: the variance-preserving SDE, its reversal, and the flow with the same marginals.

    forward   dx = -½ β(t) x dt + √β(t) dw                       (Song et al. 2021, equation 11)
    reverse   dx = (-½ β(t) x - β(t) ∇ log p_t(x)) dt + √β(t) dw̄  (equation 6)
    flow      dx = (-½ β(t) x - ½ β(t) ∇ log p_t(x)) dt           (equation 13)

t runs from 0, the data, to 1. A constant β makes the forward process that of Ornstein and Uhlenbeck.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.process import spread

Score = Callable[[Tensor, Tensor], Tensor]
"""(x (B, …), t (B,) in [0, 1]) -> ∇ log p_t(x) (B, …)."""


@dataclass(frozen=True)
class VariancePreserving:
    """β(t) linear from `beta_min` to `beta_max` (Song et al. 2021, appendix C); the limit of DDPM's linear schedule."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"beta_min must be in (0, beta_max = {self.beta_max:g}], got {self.beta_min:g}")

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ(t) = exp(-∫₀ᵗ β): x_t | x_0 ~ N(√ᾱ(t) x_0, 1 - ᾱ(t)) (equation 29)."""
        return torch.exp(-t * self.beta_min - 0.5 * t**2 * (self.beta_max - self.beta_min))


def flow_drift(process: VariancePreserving, score: Score, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt (B, …) of the probability-flow ODE at x (B, …), t (B,)."""
    return -0.5 * spread(process.beta(t), x) * (x + score(x, t))


def reverse_drift(process: VariancePreserving, score: Score, x: Tensor, t: Tensor) -> Tensor:
    """Drift (B, …) of the reverse SDE at x (B, …), t (B,)."""
    return -spread(process.beta(t), x) * (0.5 * x + score(x, t))


def forward_path(process: VariancePreserving, x: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """x_t (len(times), B, …) at rising `times`, from x (B, …) at times[0]: exact transitions, no discretisation."""
    path = [x]
    for before, after in pairwise(times):
        ratio = process.alpha_bar(after) / process.alpha_bar(before)
        path.append(ratio.sqrt() * path[-1] + (1 - ratio).sqrt() * _noise(x, generator))
    return torch.stack(path)


def euler_maruyama(
    process: VariancePreserving, score: Score, x: Tensor, times: Tensor, generator: torch.Generator
) -> Tensor:
    """Samples (B, …) of the reverse SDE at the last of falling `times`, from x (B, …) at the first.

    No noise is added in the last step (Song et al. 2021, appendix G).
    """
    for number, (after, before) in enumerate(pairwise(times), start=1):
        step = after - before
        t = after.expand(len(x))
        x = x - step * reverse_drift(process, score, x, t)
        if number < len(times) - 1:
            x = x + (step * process.beta(after)).sqrt() * _noise(x, generator)
    return x


def divergence(drift: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The drift (B, …) at x (B, …), and its divergence (B,) there.

    Exact, one backward pass for each element of a sample; or, with `probes` (K, B, …) of zero mean and unit variance,
    Hutchinson's unbiased estimate by K of them (Grathwohl et al. 2019, equation 7).
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = drift(x)
        if probes is None:
            flat = value.flatten(1)
            rows = [torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0] for i in range(flat.shape[1])]
            trace = sum(row.flatten(1)[:, i] for i, row in enumerate(rows))
        else:
            products = [
                (torch.autograd.grad((value * probe).sum(), x, retain_graph=True)[0] * probe).flatten(1).sum(dim=1)
                for probe in probes
            ]
            trace = torch.stack(products).mean(dim=0)
    return value.detach(), trace.detach()


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
