"""A discriminator that sees images through CLIP's image tower, which stays as it is (Sauer et al. 2021,
arXiv:2111.01007; of text-to-image models Sauer et al. 2023, arXiv:2311.17042), and their patches of pixels, to whose
textures the tower is blind."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoders.discriminator import PatchDiscriminator
from ldm.clip.export import ClipTowers

SHIFT = 8
"""Images are moved by up to an 8th of their side."""


def image_features(clip: ClipTowers, images: Tensor) -> list[Tensor]:
    """Images (B, 3, H, W) in [-1, 1] -> these, and what every layer of the image tower says of their patches,
    (B, C, h, w) each, each patch standardised over C. Gradients flow to the images."""
    tower = clip.image_encoder
    hidden = tower(pixel_values=clip.pixel_values(images), output_hidden_states=True).hidden_states[1:]
    side = tower.config.image_size // tower.config.patch_size
    patches = (F.layer_norm(layer[:, 1:].float(), layer.shape[-1:]) for layer in hidden)
    return [images, *(layer.transpose(1, 2).unflatten(2, (side, side)) for layer in patches)]


def shifted(images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, 3, H, W) moved by up to an 8th of their sides, what is beyond an edge mirrored: the translation of
    DiffAugment (Zhao et al. 2020). draws (2, B) in [0, 1)."""
    height, width = images.shape[-2:]
    pads = height // SHIFT, width // SHIFT
    padded = F.pad(images, (pads[1], pads[1], pads[0], pads[0]), mode="reflect")
    down, right = (
        (draw * (2 * pad + 1)).long()[:, None] + torch.arange(side, device=images.device)
        for draw, pad, side in zip(draws, pads, (height, width), strict=True)
    )
    rows = down[:, None, :, None].expand(*images.shape[:3], padded.shape[3])
    columns = right[:, None, None, :].expand(images.shape)
    return padded.gather(2, rows).gather(3, columns)


class FeatureDiscriminator(nn.Module):
    """Judges the features of several layers, each by a head of its own, as pictures of what a condition says, and
    images' patches for themselves."""

    def __init__(self, feature_channels: list[int], condition_dim: int, channels: int):
        super().__init__()
        self.patches = PatchDiscriminator(channels // 2)
        self.heads = nn.ModuleList(_Head(width, condition_dim, channels) for width in feature_channels)

    def forward(self, features: list[Tensor], condition: Tensor) -> Tensor:
        """features: what `image_features` gives, (B, C, h, w) each; condition (B, E), about standard normal. Returns
        logits (B, N), high for real, one for each place in each layer."""
        images, *layers = features
        judged = (head(x, condition) for head, x in zip(self.heads, layers, strict=True))
        return torch.cat([self.patches(images).flatten(1), *judged], dim=1)


class _Head(nn.Module):
    def __init__(self, width: int, condition_dim: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(width, channels, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(channels, 1, 1)
        self.project = nn.Linear(condition_dim, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x), 0.2)
        for block in self.blocks:
            h = h + F.leaky_relu(block(h), 0.2)
        fits = (h * self.project(condition)[:, :, None, None]).sum(dim=1, keepdim=True)  # Miyato & Koyama 2018
        return (self.last(h) + fits / math.sqrt(h.shape[1])).flatten(1)


def gradient_penalty(logits: Tensor, features: list[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9): the squared gradient of each sample's mean logit (B, N) with respect to
    its features, in units of theirs, mean over the batch and sum over layers. Needs a graph from features to logits."""
    gradients = torch.autograd.grad(logits.mean(dim=1).sum(), features, create_graph=True)
    pairs = zip(gradients, features, strict=True)
    return sum(gradient.square().flatten(1).sum(dim=1).mean() * layer[0].numel() for gradient, layer in pairs)
