"""Perceptual distance in the features of a CLIP image tower, which this package trains itself: nothing to download."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.export import ClipTowers


class PerceptualDistance(nn.Module):
    """Squared distance of unit-normalised features, summed over layers (Zhang et al. 2018, equation 1, w = 1)."""

    def __init__(self, clip: ClipTowers):
        super().__init__()
        self.clip = clip
        self.tower = clip.image_encoder.requires_grad_(False).eval()

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; gradients flow to x_hat. Returns the mean over the batch."""
        with torch.no_grad():
            wanted = self._features(x)
        return sum(((a - b) ** 2).sum(dim=-1).mean() for a, b in zip(self._features(x_hat), wanted, strict=True))

    def _features(self, images: Tensor) -> list[Tensor]:
        size = self.tower.config.image_size
        if images.shape[-1] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        hidden = self.tower(pixel_values=self.clip.pixel_values(images), output_hidden_states=True).hidden_states
        return [F.normalize(layer.float(), dim=-1) for layer in hidden[1:]]
