"""Augmentation of image batches as a pure function of uniform numbers, so that keys decide what is drawn."""

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_DRAWS = 8
"""Uniform numbers that one image takes."""


def augment(images: Tensor, draws: Tensor, least_area: float, jitter: float, mirror: bool) -> Tensor:
    """Random resized crop, mirrored half of the time if `mirror`, then changes of brightness, contrast and saturation.

    images (B, 3, H, W) in [-1, 1]; draws (B, NUM_DRAWS) uniform in [0, 1). The crop keeps a share of the area in
    [least_area, 1] with an aspect ratio in [3/4, 4/3], less where that would reach beyond the image; each factor of
    colour lies in [1 - jitter, 1 + jitter].
    """
    area = least_area + (1 - least_area) * draws[:, 0]
    aspect = (4 / 3) ** (2 * draws[:, 1] - 1) if least_area < 1 else torch.ones_like(area)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    side = torch.where(draws[:, 4] < 0.5, -1.0, 1.0) if mirror else torch.ones_like(area)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width * side, height
    theta[:, 0, 2], theta[:, 1, 2] = (1 - width) * (2 * draws[:, 2] - 1), (1 - height) * (2 * draws[:, 3] - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    factors = 1 + jitter * (2 * draws[:, 5:8] - 1)
    brightness, contrast, saturation = factors.T.reshape(3, -1, 1, 1, 1)
    grey = cropped.mean(dim=1, keepdim=True)
    coloured = grey + saturation * (cropped - grey)
    level = coloured.mean(dim=(1, 2, 3), keepdim=True)
    return ((level + contrast * (coloured - level) + 1) * brightness - 1).clamp(-1, 1)
