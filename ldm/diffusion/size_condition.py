"""The size an image had, where it was cropped, and its size now, as a condition (Podell et al. 2023, §2.2).

Small images need not be thrown away, and none that were cropped teach to draw what is cut off: asked for a large image
cropped at (0, 0), the U-Net draws one. Six numbers a sample, in pixels: height and width of the original, top and left
of the crop, height and width of the image. Each is embedded as a timestep is, as diffusers' `text_time` has it.
"""

from typing import Any

import torch
from torch import Tensor

NUMBERS = 6
WIDEST = 256  # of a number's embedding, Stable Diffusion XL's
OWN_WIDTH = NUMBERS * WIDEST
"""Of the condition, where the U-Net has no class embedding to share its width with."""


def unet_arguments(input_dim: int) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel. Its `projection_class_embeddings_input_dim`, `input_dim`, is the width of the
    class embedding, where it has one, and of this condition alike, so six even widths have to fit; zeros fill the rest.
    """
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": min(WIDEST, input_dim // NUMBERS // 2 * 2),
    }


def size_condition(sizes: Tensor, input_dim: int, time_embed_dim: int) -> dict[str, Tensor]:
    """`added_cond_kwargs` of the U-Net for sizes (B, 6). Its text_embeds are zeros: the caption has its own ways in."""
    text_embeds = torch.zeros(len(sizes), input_dim - NUMBERS * time_embed_dim, device=sizes.device)
    return {"text_embeds": text_embeds, "time_ids": sizes}
