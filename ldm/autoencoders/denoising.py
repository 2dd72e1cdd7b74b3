"""Denoising autoencoder: the input is corrupted, the original is to be restored (Vincent et al. 2008)."""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ldm.autoencoders.corruption import add_noise, mask
from ldm.autoencoders.plain import Autoencoder, squared_error


class DenoisingAutoencoder(Autoencoder):
    """Loss ‖f_θ(g_φ(x̃)) - x‖², x̃ the image with Gaussian noise added, then a fixed proportion of elements masked."""

    @register_to_config
    def __init__(
        self,
        image_shape: Sequence[int] = (1, 8, 8),
        architecture: str = "mlp",
        hidden_sizes: Sequence[int] = (128,),
        code_size: int = 16,
        activation: str = "relu",
        mask_proportion: float = 0.25,
        noise_deviation: float = 0.0,
    ):
        super().__init__(image_shape, architecture, hidden_sizes, code_size, activation)
        self.mask_proportion, self.noise_deviation = mask_proportion, noise_deviation

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (2, *self.image_shape)

    def corrupt(self, x: Tensor, noise: Tensor) -> Tensor:
        """x̃ of x; noise (B, 2, C, H, W): what is added, and what chooses the masked elements."""
        return mask(add_noise(x, self.noise_deviation, noise[:, 0]), self.mask_proportion, noise[:, 1])

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        error = squared_error(self.decode(self.encode(self.corrupt(x, noise))), x)
        return {"loss": error, "squared_error": error}
