"""Images as the cache sees them: told apart by their bytes, then decoded, a data worker's batch at a time.

A fault is put into a batch's `faults`, by row, and not raised: so it reaches the process that counts and names them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.buckets import crop_corner, nearest_bucket, upright_size
from ldm.data.captions import CaptionedImages
from ldm.data.decode import cropped, digest, upright
from ldm.data.records import KEY_BYTES

Sizes = Sequence[tuple[int, int]]


def identified(image: Image.Image, sizes: Sizes) -> tuple[bytes, int]:
    """A picture's key, and the number of the size nearest to its own; it is not decoded for that."""
    bucket = nearest_bucket(*upright_size(image), sizes) if len(sizes) > 1 else 0
    return digest(image), bucket


def decoded(image: Image.Image, target: tuple[int, int], side: int) -> dict[str, np.ndarray]:
    """A picture as image (3, *target) and square (3, side, side), uint8, and sizes (6,) int32: height and width of the
    original, top and left of the crop, height and width of the image."""
    image = upright(image)
    original = (image.height, image.width)
    square = np.asarray(cropped(image, side, side)).transpose(2, 0, 1)
    return {
        "images": square if target == (side, side) else np.asarray(cropped(image, *target)).transpose(2, 0, 1),
        "squares": square,
        "sizes": np.array([*original, *crop_corner(original, target), *target], np.int32),
    }


def stacked(pictures: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Pictures of one size as a batch; where the images are the squares, both are one tensor."""
    batch = {name: torch.from_numpy(np.stack([picture[name] for picture in pictures])) for name in ("squares", "sizes")}
    if pictures[0]["images"] is pictures[0]["squares"]:
        return batch | {"images": batch["squares"]}
    return batch | {"images": torch.from_numpy(np.stack([picture["images"] for picture in pictures]))}


class Identities(torch.utils.data.Dataset):
    """What images are. A batch is a dict: keys (B, 32) uint8, zeros for a fault; buckets (B,) int64, the numbers of
    their sizes; faults."""

    def __init__(self, data: CaptionedImages, sizes: Sizes):
        self.data, self.sizes = data, sizes

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Any]:
        keys, buckets, faults = np.zeros((len(rows), KEY_BYTES), np.uint8), np.zeros(len(rows), np.int64), {}
        for place, row in enumerate(rows):
            if (found := _attempt(self.data, row, lambda image: identified(image, self.sizes), faults)) is not None:
                keys[place], buckets[place] = np.frombuffer(found[0], np.uint8), found[1]
        return {"keys": torch.from_numpy(keys), "buckets": torch.from_numpy(buckets), "faults": faults}


class Pictures(torch.utils.data.Dataset):
    """Images addressed as (row, bucket), all of one bucket. A batch is `stacked` of those that can be decoded, if there
    are any, with rows, a list of B; and faults."""

    def __init__(self, data: CaptionedImages, sizes: Sizes):
        self.data, self.sizes, self.side = data, sizes, data.config.image_size

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        found, faults, target = {}, {}, self.sizes[places[0][1]]
        for row, _ in places:
            picture = _attempt(self.data, row, lambda image: decoded(image, target, self.side), faults)
            if picture is not None:
                found[row] = picture
        batch = {"rows": list(found), "faults": faults}
        return batch | stacked(list(found.values())) if found else batch


def _attempt(data: CaptionedImages, row: int, work: Callable[[Image.Image], Any], faults: dict[int, str]) -> Any:
    """What `work` makes of a row's picture, or None and a fault."""
    try:
        return work(data.open(row))
    except Exception as error:  # damaged files make decoders raise anything
        faults[row] = f"{data.name(row)} cannot be decoded: {error}"
        return None
