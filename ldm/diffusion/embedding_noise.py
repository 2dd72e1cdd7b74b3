"""Noise on CLIP image embeddings, and what the U-Net is told of its level: Stable unCLIP's, an augmentation of the
condition as in cascades (Ho et al. 2021, arXiv:2106.15282). DALL·E 2 gives its decoder the embeddings as they are.

Stock StableUnCLIPPipeline does the same in sampling (`noise_image_embeddings`): training and sampling must agree.
"""

import math

import torch
from torch import Tensor

from ldm.diffusion.process import q_sample


def noised_embedding(
    embeds: Tensor, mean: Tensor, std: Tensor, level: Tensor, alpha_bar: Tensor, noise: Tensor
) -> Tensor:
    """The U-Net's class condition (B, 2D): embeddings (B, D) noised to `level` (B,), then the level's embedding.

    Noise is added to standardised embeddings, mean and std (D,), which are scaled back afterwards. alpha_bar (T,).
    """
    standardised = q_sample((embeds - mean) / std, alpha_bar[level], noise)
    return torch.cat([standardised * std + mean, level_embedding(level, embeds.shape[1]).to(embeds)], dim=1)


def level_embedding(level: Tensor, dim: int) -> Tensor:
    """Sinusoids (B, dim) of the noise level, cosines first (Vaswani et al. 2017, §3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=level.device, dtype=torch.float32) / half)
    angles = level.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
