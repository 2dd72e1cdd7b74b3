"""Plain autoencoder: a code g_φ(x) from which f_θ restores x (Hinton & Salakhutdinov 2006)."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldm.autoencoders import networks
from ldm.autoencoders.corruption import mask


class Autoencoder(ModelMixin, ConfigMixin):
    """x' = f_θ(g_φ(x)), trained on the squared error. Images (B, C, H, W) in [0, 1], codes (B, code_size).

    The kinds beside it change how a code is made or what the loss asks; all are saved and loaded as Diffusers models.
    """

    @register_to_config
    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        architecture: str = "mlp",
        hidden_sizes: Sequence[int] = (128,),
        code_size: int = 16,
        activation: str = "relu",
    ):
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.encoder = networks.encoder(architecture, image_shape, hidden_sizes, code_size, activation)
        self.decoder = networks.decoder(architecture, image_shape, hidden_sizes, code_size, activation)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the standard normal noise that `forward` takes for each image."""
        return (0,)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, code_size) of images."""
        return self.encoder(x)[0]

    def decode(self, code: Tensor) -> Tensor:
        """Images of codes; near [0, 1] where training went well, not cut to it."""
        return self.decoder(code)[0]

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """`loss`, and its parts, of a batch; noise (B, *noise_shape)."""
        error = squared_error(self.decode(self.encode(x)), x)
        return {"loss": error, "squared_error": error}

    @torch.no_grad()
    def measure(self, x: Tensor, generator: torch.Generator) -> dict[str, float]:
        """What is worth knowing of images that were not trained on: the squared error, and that of images restored
        from a quarter of their pixels masked."""
        masked = mask(x, 0.25, torch.rand(x.shape, generator=generator).to(x.device))
        return {
            "squared_error": squared_error(self.decode(self.encode(x)), x).item(),
            "squared_error_masked": squared_error(self.decode(self.encode(masked)), x).item(),
        }


def squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """‖x̂ - x‖², summed over an image's elements, the mean over the batch."""
    return ((x_hat - x) ** 2).flatten(1).sum(dim=1).mean()
