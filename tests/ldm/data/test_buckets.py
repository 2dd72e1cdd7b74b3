"""Sizes of different aspect ratios, and the part of an image that each keeps."""

import numpy as np
import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.data.buckets import bucket_sizes, crop_corner, nearest_bucket, upright_size
from ldm.data.decode import cropped
from ldm.errors import UserError


def test_without_buckets_there_is_the_square():
    assert bucket_sizes(DataConfig(image_size=256)) == [(256, 256)]


@pytest.mark.parametrize(("side", "step", "widest"), [(256, 64, 2.0), (512, 64, 2.0), (1024, 64, 4.0), (32, 8, 3.0)])
def test_sizes_have_about_the_area_of_the_square_and_both_orientations(side, step, widest):
    config = DataConfig(image_size=side, aspect_buckets=True, bucket_step=step, max_aspect_ratio=widest)
    sizes = bucket_sizes(config)
    assert sizes[0] == (side, side) and len(sizes) == len(set(sizes)) > 2
    for height, width in sizes:
        assert height % step == width % step == 0
        assert (width, height) in sizes
        assert max(height / width, width / height) <= widest
        assert abs(height * width - side**2) <= step / 2 * min(height, width)


def test_sizes_of_256_pixels():
    assert set(bucket_sizes(DataConfig(image_size=256, aspect_buckets=True))) == {(256, 256), (192, 320), (320, 192)}


def test_a_step_that_does_not_divide_the_square_is_refused():
    with pytest.raises(UserError, match=r"data\.bucket_step must be a divisor of data\.image_size 100, got 64"):
        DataConfig(image_size=100, aspect_buckets=True)


def test_the_nearest_ratio_wins():
    images = [(100, 100), (100, 120), (100, 140), (100, 900), (4000, 3000)]
    sizes = [(256, 256), (192, 320), (320, 192)]
    assert [nearest_bucket(*image, sizes) for image in images] == [0, 0, 1, 1, 2]


def test_a_turned_photograph_goes_where_it_will_be_seen():
    image = Image.new("RGB", (30, 20))
    assert upright_size(image) == (20, 30)
    image.getexif()[0x0112] = 6
    assert upright_size(image) == (30, 20)


@pytest.mark.parametrize(("original", "target"), [((40, 80), (32, 32)), ((90, 30), (24, 40)), ((24, 40), (24, 40))])
def test_the_corner_is_that_of_the_part_that_is_kept(original, target):
    """Of an image whose pixels say where they are, scaled by hand, the part at the corner is what `cropped` keeps."""
    rows, columns = np.mgrid[: original[0], : original[1]]
    image = Image.fromarray(np.stack([rows * 2, columns * 2, rows * 0], axis=-1).astype(np.uint8))
    scale = max(target[0] / original[0], target[1] / original[1])
    scaled = image.resize((round(original[1] * scale), round(original[0] * scale)), Image.Resampling.BICUBIC)
    top, left = crop_corner(original, target)
    by_hand = np.asarray(scaled)[top : top + target[0], left : left + target[1]].astype(int)
    assert by_hand.shape == (*target, 3)
    assert np.abs(by_hand - np.asarray(cropped(image, *target)).astype(int)).max() <= 6
