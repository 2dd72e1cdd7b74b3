"""Sparse autoencoder: hidden units that are rarely active (Ng 2011)."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldm.autoencoders.plain import Autoencoder, squared_error


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


class SparseAutoencoder(Autoencoder):
    """Loss ‖x' - x‖² + β Σ_l Σ_j KL(ρ ‖ ρ̂_j), over the units j of every hidden layer l, the code among them.

    All those units are sigmoids, whose means over the data are pulled to ρ.
    """

    @register_to_config
    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        architecture: str = "mlp",
        hidden_sizes: Sequence[int] = (),
        code_size: int = 128,
        rho: float = 0.25,
        sparsity_weight: float = 1.0,
    ):
        super().__init__(image_shape, architecture, hidden_sizes, code_size, "sigmoid")
        self.rho, self.sparsity_weight = rho, sparsity_weight

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)[0].sigmoid()

    def activations(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x', and the activations (B, units) of every hidden layer from image to image."""
        code, encoding = self.encoder(x)
        code = code.sigmoid()
        x_hat, decoding = self.decoder(code)
        return x_hat, [*encoding, code, *decoding]

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        x_hat, activations = self.activations(x)
        error, penalty = squared_error(x_hat, x), sparsity_penalty(activations, self.rho)
        return {"loss": error + self.sparsity_weight * penalty, "squared_error": error, "sparsity_penalty": penalty}

    @torch.no_grad()
    def measure(self, x: Tensor, generator: torch.Generator) -> dict[str, float]:
        """As of the plain one, with ρ̂: its mean over units, and the unit farthest from ρ."""
        rho_hat = torch.cat([activation.mean(dim=0) for activation in self.activations(x)[1]])
        return {
            **super().measure(x, generator),
            "rho_hat": rho_hat.mean().item(),
            "rho_hat_largest_error": (rho_hat - self.rho).abs().max().item(),
        }
