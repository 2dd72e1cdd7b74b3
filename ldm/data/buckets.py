"""Sizes of about as many pixels and of different aspect ratios, so that images need not all be cut to squares."""

import math
from collections.abc import Sequence

from PIL import Image

from ldm.config import DataConfig

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap height and width


def bucket_sizes(config: DataConfig) -> list[tuple[int, int]]:
    """(height, width) of every bucket, the square first: the square alone without `aspect_buckets`, else sides that are
    multiples of `bucket_step`, areas as near to image_size² as those allow, and no longer than `max_aspect_ratio`."""
    side, step = config.image_size, config.bucket_step
    sizes = [(side, side)]
    if config.aspect_buckets:
        for short in range(step, side, step):
            long = round(side**2 / short / step) * step
            if long <= config.max_aspect_ratio * short:
                sizes += [(short, long), (long, short)]
    return sizes


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Number of the bucket whose aspect ratio is nearest, by the ratio of ratios: the one that cuts the least off."""
    ratio = math.log(height / width)
    return min(range(len(sizes)), key=lambda number: abs(ratio - math.log(sizes[number][0] / sizes[number][1])))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a picture once it is turned as its EXIF tag says; only its header is read."""
    turned = image.getexif().get(ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def crop_corner(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """(top, left) of the part that `decode.cropped` keeps, in pixels of the scaled image."""
    scale = max(target[0] / original[0], target[1] / original[1])
    return tuple(max(0, round((side * scale - kept) / 2)) for side, kept in zip(original, target, strict=True))
