"""k-sparse autoencoder: of the code only the k largest units are kept (Makhzani & Frey 2013, algorithm 1)."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldm.autoencoders.plain import Autoencoder


def keep_largest(code: Tensor, k: int) -> Tensor:
    """The code (B, units) with all but each sample's k largest set to 0; the gradient flows through those alone.

    Of equal units, k are kept all the same.

    Raises:
        ValueError: k outside 1 … units.
    """
    if not 1 <= k <= code.shape[1]:
        raise ValueError(f"k must be in 1 … {code.shape[1]}, the units of the code, got {k}")
    largest = code.topk(k, dim=1).indices
    return code * torch.zeros_like(code).scatter_(1, largest, 1.0)


class KSparseAutoencoder(Autoencoder):
    """The plain autoencoder, linear as in the paper where `hidden_sizes` is empty, with k active units in each code."""

    @register_to_config
    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        architecture: str = "mlp",
        hidden_sizes: Sequence[int] = (),
        code_size: int = 1000,
        activation: str = "relu",
        k: int = 25,
    ):
        super().__init__(image_shape, architecture, hidden_sizes, code_size, activation)
        if not 1 <= k <= code_size:
            raise ValueError(f"k must be in 1 … {code_size}, the units of the code, got {k}")
        self.k = k

    def encode(self, x: Tensor) -> Tensor:
        return keep_largest(self.encoder(x)[0], self.k)

    @torch.no_grad()
    def measure(self, x: Tensor, generator: torch.Generator) -> dict[str, float]:
        """As of the plain one, with the least and greatest number of active units, and the share of units ever used."""
        active = self.encode(x) != 0
        return {
            **super().measure(x, generator),
            "fewest_active": active.sum(dim=1).min().item(),
            "most_active": active.sum(dim=1).max().item(),
            "units_used": active.any(dim=0).float().mean().item(),
        }
