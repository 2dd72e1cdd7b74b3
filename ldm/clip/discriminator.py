"""A discriminator that sees images through CLIP's image tower, which stays as it is (Sauer et al. 2021,
arXiv:2111.01007; of text-to-image models Sauer et al. 2023, arXiv:2311.17042), and with convolutions of its own."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Judges images as pictures of what a condition says: by the features of several layers of a network that stays as
    it is, and by those of convolutions of its own, which learn the details that one has no eye for."""

    def __init__(self, feature_channels: list[int], condition_dim: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 4, stride=2, padding=1)
        self.stages = nn.ModuleList(_Stage(channels * i, channels * o) for i, o in ((1, 2), (2, 4), (4, 4)))
        self.heads = nn.ModuleList(_Head(width, condition_dim, channels, 2) for width in feature_channels)
        self.heads.extend(_Head(channels * o, condition_dim, channels, 0) for o in (2, 4, 4))

    def forward(self, features: list[Tensor], condition: Tensor, other: Tensor | None = None) -> list[Tensor]:
        """features: what `image_features` gives, (B, C, h, w) each; condition (B, E), about standard normal. Returns
        each head's logits (B, N), high for real, one for each place; with `other` (R, E) those of the first R images
        under that condition after them, (B + R, N)."""
        images, *layers = features
        x = self.first(images)
        for number, stage in enumerate(self.stages):
            x = stage(F.avg_pool2d(x, 2) if number else x)
            layers.append(x)
        return [head(layer, condition, other) for head, layer in zip(self.heads, layers, strict=True)]


class _Stage(nn.Module):
    """(B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(16, narrow), narrow) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(narrow, out, 3, padding=1) for out in (narrow, wide))
        self.skip = nn.Conv2d(narrow, wide, 1) if narrow != wide else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = convolution(F.leaky_relu(norm(h), 0.2))
        return self.skip(x) + h


class _Head(nn.Module):
    def __init__(self, width: int, condition_dim: int, channels: int, num_blocks: int):
        super().__init__()
        self.first = nn.Conv2d(width, channels, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_blocks))
        self.last = nn.Conv2d(channels, 1, 1)
        self.project = nn.Linear(condition_dim, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor, other: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.first(x), 0.2)
        for block in self.blocks:
            h = h + F.leaky_relu(block(h), 0.2)
        logits = self._logits(h, condition)
        return logits if other is None else torch.cat([logits, self._logits(h[: len(other)], other)])

    def _logits(self, h: Tensor, condition: Tensor) -> Tensor:
        fits = (h * self.project(condition)[:, :, None, None]).sum(dim=1, keepdim=True)  # Miyato & Koyama 2018
        return (self.last(h) + fits / math.sqrt(h.shape[1])).flatten(1)


def mean_over_heads(values: Iterable[Tensor]) -> Tensor:
    """Every head counts alike, however many places it looks at."""
    return torch.stack(list(values)).mean(dim=0)


def gradient_penalty(logits: list[Tensor], features: list[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9): the squared gradient of each sample's mean logit, of each head's (B, N),
    with respect to its pixels and, in units of theirs, its features; mean over the batch and sum over layers. Needs a
    graph from features to logits."""
    whole = mean_over_heads(of_head.mean(dim=1) for of_head in logits).sum()
    squares = (g.square().flatten(1) for g in torch.autograd.grad(whole, features, create_graph=True))
    of_images, *of_layers = (
        square.sum(dim=1).mean() * (square.shape[1] if n else 1) for n, square in enumerate(squares)
    )
    return sum(of_layers, of_images)
