"""Images as a pixel-space diffusion model sees them: where latents have a posterior, these are what they are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.data.captions import CaptionedImages


class Pixels(torch.utils.data.Dataset):
    """Images addressed as (epoch, index), in the shape of a batch of `CachedLatents` without conditions:
    latent_mean (B, C, S, S) in [-1, 1], latent_std (B, 1, 1, 1) of zeros."""

    def __init__(self, images: CaptionedImages, greyscale: bool):
        self.images, self.greyscale = images, greyscale
        side = images.config.image_size
        self.latent_shape = (1 if greyscale else 3, side, side)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        x = self.images.__getitems__(places)["images"]
        x = x.mean(dim=1, keepdim=True) if self.greyscale else x
        return {"latent_mean": x, "latent_std": torch.zeros(len(x), 1, 1, 1)}
