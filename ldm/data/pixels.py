"""Images as a pixel-space diffusion model sees them: where latents have a posterior, these are what they are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.data.captions import CaptionedImages
from ldm.data.stream import CaptionedStream
from ldm.errors import UserError

MOST_CLASSES = 1000


class Pixels(torch.utils.data.Dataset):
    """Images addressed as (epoch, index), in the shape of a batch of `CachedLatents`: latent_mean (B, C, S, S) in
    [-1, 1], latent_std (B, 1, 1, 1) of zeros, indices (B,). With `class_conditional`, class_labels (B,) int64 too: the
    number of the canonical caption in `classes`, whose first, "", stands for none."""

    def __init__(self, images: CaptionedImages | CaptionedStream, greyscale: bool, class_conditional: bool):
        """Raises UserError where captions are too many to be classes, or not known until they are read."""
        self.images, self.greyscale = images, greyscale
        side = images.config.image_size
        self.latent_shape = (1 if greyscale else 3, side, side)
        self.classes: list[str] = []
        if class_conditional and self.is_streamed:
            raise UserError(f"class_conditional: the classes of {images.config.source} are not known before it is read "
                            "to its end; set data.streaming=false")  # fmt: skip
        if class_conditional:
            captions = [images.captions(index)[0] for index in range(len(images))]
            self.classes = ["", *sorted(set(captions) - {""})]
            if len(self.classes) > MOST_CLASSES:
                raise UserError(
                    f"class_conditional: {images.config.source} has {len(self.classes) - 1} different captions, of "
                    f"which at most {MOST_CLASSES - 1} can be classes; train CLIP, and the U-Net on a latent cache"
                )
            numbers = {caption: number for number, caption in enumerate(self.classes)}
            self.labels = torch.tensor([numbers[caption] for caption in captions])

    buckets = None
    """All images are of one shape."""

    @property
    def is_streamed(self) -> bool:
        return isinstance(self.images, CaptionedStream)

    def excerpt(self, count: int) -> "Pixels":
        """Of a stream the first `count`, which can be addressed."""
        return Pixels(self.images.excerpt(count), self.greyscale, class_conditional=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        batch = self.prepared(self.images.__getitems__(places))
        if self.classes:
            batch["class_labels"] = self.labels[batch["indices"]]
        return batch

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of images in the shape of one of latents; without images and captions, all else as it was."""
        if "fault" in batch:
            return batch
        x = batch["images"].mean(dim=1, keepdim=True) if self.greyscale else batch["images"]
        rest = {name: values for name, values in batch.items() if name not in ("images", "captions")}
        return {**rest, "latent_mean": x, "latent_std": torch.zeros(len(x), 1, 1, 1)}
