"""A discriminator that sees images through CLIP's image tower and another network, which stay as they are (Sauer et al.
2021, arXiv:2111.01007; of text-to-image models Sauer et al. 2023, arXiv:2311.17042), and their patches of pixels, to
whose textures these are blind."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoders.discriminator import PatchDiscriminator
from ldm.clip.export import ClipTowers
from ldm.evaluation.features import FeatureLayers

SHIFT = 8
"""Images are moved by up to an 8th of their side."""


def image_features(clip: ClipTowers, images: Tensor, further: FeatureLayers | None = None) -> list[Tensor]:
    """Images (B, 3, H, W) in [-1, 1] -> these, and what every layer of the image tower, and of a `further` network,
    says of their places, (B, C, h, w) each, each place standardised over C. Gradients flow to the images."""
    tower = clip.image_encoder
    hidden = tower(pixel_values=clip.pixel_values(images), output_hidden_states=True).hidden_states[1:]
    side = tower.config.image_size // tower.config.patch_size
    layers = [layer[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for layer in hidden]
    layers += [] if further is None else further.read((images + 1) / 2)
    return [images, *(_standardised(layer.float()) for layer in layers)]


def _standardised(layer: Tensor) -> Tensor:
    return F.layer_norm(layer.movedim(1, -1), layer.shape[1:2]).movedim(-1, 1)


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
    images' patches for themselves. Every head counts alike, however many places it looks at."""

    def __init__(self, feature_channels: list[int], condition_dim: int, channels: int):
        super().__init__()
        self.patches = PatchDiscriminator(channels // 2)
        self.heads = nn.ModuleList(_Head(width, condition_dim, channels) for width in feature_channels)

    def forward(self, features: list[Tensor], condition: Tensor) -> list[Tensor]:
        """features: what `image_features` gives, (B, C, h, w) each; condition (B, E), about standard normal. Returns
        each head's logits (B, N), high for real, one for each place."""
        images, *layers = features
        judged = (head(x, condition) for head, x in zip(self.heads, layers, strict=True))
        return [self.patches(images).flatten(1), *judged]


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


def mean_over_heads(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.float() for value in values]).mean(dim=0)


def gradient_penalty(logits: list[Tensor], features: list[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018, equation 9): the squared gradient of each sample's mean logit, of each head's (B, N),
    with respect to its features, in units of theirs, mean over the batch and sum over layers. Needs a graph from
    features to logits."""
    whole = mean_over_heads(judged.mean(dim=1) for judged in logits).sum()
    gradients = torch.autograd.grad(whole, features, create_graph=True)
    pairs = zip(gradients, features, strict=True)
    return sum(gradient.square().flatten(1).sum(dim=1).mean() * layer[0].numel() for gradient, layer in pairs)
