"""open_clip's model with the shapes that transformers' CLIP towers can hold, and what training needs beside it."""

import math

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError

LARGEST_SCALE = math.log(100)
"""Largest logit scale: a temperature of 0.01 (Radford et al. 2021, §2.5)."""
IGNORED = -100
"""The target of what cross entropy passes over."""


def build(
    *,
    embedding_dim: int,
    image_size: int,
    patch_size: int,
    vision_width: int,
    vision_layers: int,
    vision_heads: int,
    text_width: int,
    text_layers: int,
    text_heads: int,
    vocabulary_size: int,
    context_length: int,
    mlp_ratio: float = 4.0,
    text_mlp_ratio: float = 4.0,
) -> open_clip.CLIP:
    """A vision transformer over patches of `patch_size` pixels and a causal text transformer, randomly initialised.

    Both embed into `embedding_dim` dimensions.

    Raises:
        UserError: a width is no multiple of its heads, or the image none of its patches.
    """
    for tower, width, heads in (("vision", vision_width, vision_heads), ("text", text_width, text_heads)):
        if width % heads:
            raise UserError(f"model.{tower}_width {width}: must be a multiple of model.{tower}_heads {heads}")
    if image_size % patch_size:
        raise UserError(f"model.patch_size {patch_size}: must divide data.image_size {image_size}")
    vision = open_clip.CLIPVisionCfg(
        layers=vision_layers,
        width=vision_width,
        head_width=vision_width // vision_heads,
        mlp_ratio=mlp_ratio,
        patch_size=patch_size,
        image_size=image_size,
    )
    text = open_clip.CLIPTextCfg(
        context_length=context_length,
        vocab_size=vocabulary_size,
        width=text_width,
        heads=text_heads,
        layers=text_layers,
        mlp_ratio=text_mlp_ratio,
    )
    return open_clip.CLIP(embedding_dim, vision, text)


@torch.no_grad()
def clamp_temperature(model: open_clip.CLIP) -> None:
    """Keeps the factor on the cosines in [1, 100], after every step."""
    model.logit_scale.clamp_(0, LARGEST_SCALE)


def captioned_loss(image_logits: Tensor, text_logits: Tensor, captioned: Tensor, own: slice) -> Tensor:
    """CLIP's loss (Radford et al. 2021, §2.3) over images with a caption alone; where all have one, bit for bit
    open_clip's.

    Equal captions need no care: with them as positives (UniCL, Yang et al. 2022, §3.2) the loss is the same, as their
    texts' embeddings are.

    Scaled cosines of the images of this process with all texts, and of its texts with all images, (b, B); captioned
    (B,) bool, of which those of this process are `own`. The mean over processes is the loss of the whole batch.
    """
    pairs = torch.arange(len(captioned), device=captioned.device)[own]
    of_captioned = torch.where(captioned[own], pairs, IGNORED)
    count = captioned.sum().clamp(min=1) * (len(pairs) / len(captioned))  # nothing here waits for the device

    def direction(logits: Tensor) -> Tensor:
        logits = logits.masked_fill(~captioned, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, of_captioned, ignore_index=IGNORED, reduction="sum") / count

    return (direction(image_logits) + direction(text_logits)) / 2


def retrieval_at_1(image_embeds: Tensor, text_embeds: Tensor, caption_ids: Tensor) -> tuple[float, float]:
    """Share of images whose nearest text is theirs, and of texts whose nearest image is theirs.

    Unit-length embeddings (B, D); caption_ids (B,) are equal where captions are, and any of those
    counts as right.
    """
    cosines = image_embeds.float() @ text_embeds.float().T
    to_text = (caption_ids[cosines.argmax(dim=1)] == caption_ids).float().mean()
    to_image = (caption_ids[cosines.argmax(dim=0)] == caption_ids).float().mean()
    return to_text.item(), to_image.item()
