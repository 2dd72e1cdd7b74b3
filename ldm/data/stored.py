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


class Identities(torch.utils.data.Dataset):
    """What images are, undecoded. A batch is a dict: keys (B, 32) uint8, their digests, zeros for a fault; buckets (B,)
    int64, the numbers of their sizes; faults."""

    def __init__(self, data: CaptionedImages, sizes: Sizes):
        self.data, self.sizes = data, sizes

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Any]:
        keys, buckets, faults = np.zeros((len(rows), KEY_BYTES), np.uint8), np.zeros(len(rows), np.int64), {}

        def identify(image: Image.Image) -> tuple[bytes, int]:
            bucket = nearest_bucket(*upright_size(image), self.sizes) if len(self.sizes) > 1 else 0
            return digest(image), bucket

        for place, row in enumerate(rows):
            if (found := _attempt(self.data, row, identify, faults)) is not None:
                keys[place], buckets[place] = np.frombuffer(found[0], np.uint8), found[1]
        return {"keys": torch.from_numpy(keys), "buckets": torch.from_numpy(buckets), "faults": faults}


class Pictures(torch.utils.data.Dataset):
    """Images addressed as (row, bucket), all of one bucket. A batch is a dict of those that can be decoded: rows, a
    list of B; images (B, 3, h, w) and squares (B, 3, S, S) uint8; sizes (B, 6) int32, which are height and width of the
    original, top and left of the crop, height and width of the image; faults."""

    def __init__(self, data: CaptionedImages, sizes: Sizes):
        self.data, self.sizes, self.side = data, sizes, data.config.image_size

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        decoded, faults = {}, {}
        target = self.sizes[places[0][1]]

        def decode(image: Image.Image) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
            image = upright(image)
            original = (image.height, image.width)
            views = (np.asarray(cropped(image, *size)).transpose(2, 0, 1) for size in (target, (self.side, self.side)))
            return *views, (*original, *crop_corner(original, target), *target)

        for row, _ in places:
            if (found := _attempt(self.data, row, decode, faults)) is not None:
                decoded[row] = found
        batch = {"rows": list(decoded), "faults": faults}
        if decoded:
            images, squares, sizes = (np.stack(part) for part in zip(*decoded.values(), strict=True))
            batch["squares"] = torch.from_numpy(squares)
            batch["images"] = batch["squares"] if target == (self.side, self.side) else torch.from_numpy(images)
            batch["sizes"] = torch.from_numpy(sizes.astype(np.int32))
        return batch


def _attempt(data: CaptionedImages, row: int, work: Callable[[Image.Image], Any], faults: dict[int, str]) -> Any:
    """What `work` makes of a row's picture, or None and a fault."""
    try:
        return work(data.open(row))
    except Exception as error:  # damaged files make decoders raise anything
        faults[row] = f"image {row} of {data.config.source} cannot be decoded: {error}"
        return None
