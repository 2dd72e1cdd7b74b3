"""Timesteps drawn more often where the bound's terms are large and noisy (Nichol & Dhariwal 2021, §3.3).

Only for the bound: the history of its terms, HISTORY at each timestep, decides; until it is full, t is uniform.
"""

import torch
from torch import Tensor

HISTORY = 10
LEAST_SHARE = 1e-3
"""Probability mass that stays uniform, so that no timestep is forgotten."""


def empty_history(num_timesteps: int) -> Tensor:
    """(T, HISTORY), NaN where no term has been seen."""
    return torch.full((num_timesteps, HISTORY), torch.nan, dtype=torch.float64)


def remember(history: Tensor, t: Tensor, terms: Tensor) -> Tensor:
    """The history with the bound's terms (B,) at timesteps t (B,), in the order of the batch; the oldest are forgotten.

    Raises:
        ValueError: a timestep outside 0 … T - 1.
    """
    if len(outside := t[(t < 0) | (t >= len(history))]):
        raise ValueError(f"t must be in 0 … {len(history) - 1}, got {outside[0].item()}")
    history = history.clone()
    for step, term in zip(t.tolist(), terms.detach().to(history).tolist(), strict=True):
        history[step] = torch.cat([history[step, 1:], history.new_tensor([term])])
    return history


def probabilities(history: Tensor) -> Tensor:
    """p_t (T,) ∝ √E[L_t²] over the history, mixed with LEAST_SHARE of uniform; uniform while any place is NaN."""
    uniform = torch.full((len(history),), 1 / len(history), dtype=history.dtype)
    if history.isnan().any():
        return uniform
    root = (history**2).mean(dim=1).sqrt()
    return (1 - LEAST_SHARE) * root / root.sum() + LEAST_SHARE * uniform


def draw_timesteps(draws: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) from uniform numbers (B,) in [0, 1), and the weights 1 / (T p_t) that keep the loss unbiased."""
    t = torch.searchsorted(p.cumsum(0), draws.to(p), right=True).clamp(max=len(p) - 1)
    return t, 1 / (len(p) * p[t])
