"""Which pairs of a batch CLIP contrasts: images without a caption in none, images of one caption against each other or
not. Without either it is open_clip's loss."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

NO_CAPTION = -1


def caption_groups(captions: Sequence[str]) -> Tensor:
    """(B,) int64, in every process: equal where captions are, NO_CAPTION for empty ones."""
    digests = (hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest() for caption in captions)
    numbers = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]
    return torch.tensor(
        [number if caption.strip() else NO_CAPTION for number, caption in zip(numbers, captions, strict=True)]
    )


def each_its_own(groups: Tensor) -> Tensor:
    """Groups (B,) in which captions that are equal are not told of."""
    return torch.where(groups == NO_CAPTION, groups, torch.arange(len(groups), device=groups.device))


def grouped_loss(image_logits: Tensor, text_logits: Tensor, groups: Tensor, own: slice) -> Tensor:
    """UniCL's loss in both directions (Yang et al. 2022, §3.2), its mean instead of its sum: with groups of one it is
    CLIP's. All of a group are positives in equal shares; those without a caption are left out.

    Scaled cosines of the images of this process with all texts, and of its texts with all images, (b, B); groups (B,),
    of which those of this process are `own`. The mean over processes is the loss of the whole batch.
    """
    captioned = groups != NO_CAPTION
    positive = ((groups[own, None] == groups) & captioned).to(image_logits.dtype)
    shares = positive / positive.sum(dim=1, keepdim=True).clamp(min=1)
    total = 0
    for logits in (image_logits, text_logits):
        log_p = logits.masked_fill(~captioned, torch.finfo(logits.dtype).min).log_softmax(dim=1)
        total = total - (shares * log_p).sum() / 2
    return total / captioned.sum().clamp(min=1) * (len(groups) / len(positive))
