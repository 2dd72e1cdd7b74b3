"""The images and captions that a model is judged by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.config import DataConfig
from ldm.data.captions import CaptionedImages, open_images
from ldm.data.splits import captioned, choose_split, splits_of
from ldm.data.text_files import NOT_TRAINED_ON
from ldm.errors import UserError
from ldm.training import randomness
from pipelines.evaluation.stored import Pictures


@dataclass(frozen=True)
class Judged:
    """Picture n is drawn from `captions[n]`, which is that of the image `indices[n % len(indices)]`."""

    split: str
    config: DataConfig
    images: CaptionedImages
    indices: list[int]
    captions: list[str]
    reference_split: str
    reference: CaptionedImages
    """What the pictures are compared with: images that were trained on, where the data say which these are."""
    reference_indices: list[int]

    @property
    def made_of(self) -> str:
        """What captions are made of."""
        names = f" ({', '.join(self.config.label_names)})" if self.config.label_names else ""
        return self.config.caption_column or " ".join(self.config.caption_templates) + names or "the data's own"

    @property
    def against(self) -> str:
        return f"{len(self.reference_indices):,} images of {self.reference_split}"

    @property
    def doubt(self) -> str | None:
        """What is to be said of data that nothing keeps apart from training; None where their split's name does."""
        if self.split in NOT_TRAINED_ON:
            return None
        return (
            f"nothing says that these images ({self.split}) were kept from training: a model that was trained on them "
            "looks better than it is; take data that were kept from it, or name their split with --split"
        )

    @property
    def has_other_reference(self) -> bool:
        return self.reference is not self.images


def open_judged(
    source: str,
    split: str | None,
    against: str | None,
    image_size: int,
    num_images: int,
    reference_images: int,
    seed: int,
    caption_column: str | None,
    caption_template: str | None,
    label_names: Sequence[str] = (),
) -> Judged:
    """Opens `source`. Which samples are taken is a function of `seed`, and of a larger `num_images` the first are the
    same.

    against: the split that pictures are compared with; None: `train` where there is one, or else the captions' own.
    label_names: of labels that are whole numbers.

    Raises:
        UserError: no such source or split, or no captions there.
    """
    there = splits_of(source)
    chosen = choose_split(source, there, split)
    compared = against or ("train" if "train" in there else chosen)
    if compared not in there:
        raise UserError(f"--against '{compared}': {source} has {', '.join(there)}")
    config = replace(there[chosen], image_size=image_size, label_names=list(label_names))
    config = captioned(config, caption_column, caption_template)
    images = open_images(config, seed)
    reference = images
    if compared != chosen:
        own = {name: getattr(there[compared], name) for name in ("source", "split")}
        reference = open_images(replace(config, **own), seed)
    order = _order(seed, len(images))
    indices = order[: min(num_images, len(order))]
    captions = [images.captions(indices[number % len(indices)])[0] for number in range(num_images)]
    if empty := [index for index, caption in zip(indices, captions, strict=False) if not caption.strip()]:
        raise UserError(
            f"--data {source}: image {empty[0]} of {chosen} has an empty caption, as have {len(empty)} in all"
        )
    return Judged(
        chosen, config, images, indices, captions, compared, reference, _order(seed, len(reference))[:reference_images]
    )  # fmt: skip


def pictures_of(data: CaptionedImages, indices: list[int]) -> Pictures:
    """The data's own; the next that can be decoded stands in for one that cannot."""

    def read(numbers: Sequence[int]) -> Tensor:
        batch = data.__getitems__([(0, number) for number in numbers])
        return ((batch["images"] + 1) * 127.5).round().to(torch.uint8)

    return Pictures(read, indices)


def _order(seed: int, length: int) -> list[int]:
    return torch.randperm(length, generator=randomness.generator(seed, "evaluated images")).tolist()
