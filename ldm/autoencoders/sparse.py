"""Sparse autoencoder: hidden units that are rarely active (Ng 2011)."""

from torch import Tensor


def bernoulli_kl(rho: float, rho_hat: Tensor) -> Tensor:
    """KL(Bernoulli(ρ) ‖ Bernoulli(ρ̂)) in nats, of each element of ρ̂.

    Infinite where ρ̂ is 0 or 1: a unit that never changes says nothing.

    Raises:
        ValueError: ρ outside (0, 1), or ρ̂ outside [0, 1], as with activations other than sigmoids.
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho must be in (0, 1), got {rho:g}")
    if len(outside := rho_hat[(rho_hat < 0) | (rho_hat > 1)]):
        raise ValueError(f"rho_hat must be in [0, 1], got {outside[0].item():g}; activations must be sigmoids")
    return rho * (rho / rho_hat).log() + (1 - rho) * ((1 - rho) / (1 - rho_hat)).log()


def sparsity_penalty(activations: list[Tensor], rho: float) -> Tensor:
    """Σ over hidden layers and their units of KL(ρ ‖ ρ̂), ρ̂ a unit's mean activation over the batch (Ng 2011, §3).

    activations: one tensor (B, units) in [0, 1] for each hidden layer; the penalty's weight β is the caller's.
    Raises ValueError as `bernoulli_kl` does.
    """
    return sum(bernoulli_kl(rho, activation.mean(dim=0)).sum() for activation in activations)
