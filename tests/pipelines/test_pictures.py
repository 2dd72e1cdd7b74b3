import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from pipelines.pictures import as_images, read_masks, read_pictures, size_of, size_to_draw


def test_arrays_and_tensors_of_every_range_are_one(photos):
    whole = np.stack([np.asarray(photo) for photo in photos])  # (2, 16, 16, 3)
    share = torch.from_numpy(whole / 255).float()
    expected = share.permute(0, 3, 1, 2)
    kinds = [
        whole,
        list(whole),
        whole / 255,
        tuple(share.numpy()),
        expected,
        list(expected),
        expected * 2 - 1,
        expected.half().float(),
        torch.from_numpy(whole).permute(0, 3, 1, 2),
    ]
    for kind in kinds:
        torch.testing.assert_close(read_pictures("image", kind), expected, atol=1e-3, rtol=0)
    assert [np.asarray(image).tolist() for image in as_images(expected)] == whole.tolist()


def test_images_of_every_mode_become_rgb():
    for mode in ("L", "1", "P", "RGBA", "CMYK", "I;16"):
        (image,) = read_pictures("image", Image.new(mode, (4, 6)))
        assert image.mode == "RGB" and size_of([image]) == (6, 4)


def test_what_is_deep_or_transparent_is_as_a_viewer_shows_it():
    deep = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    clear = Image.new("LA", (4, 4), (90, 0))
    brushed = Image.new("RGBA", (4, 4), (255, 255, 255, 0))  # a mask painted on a layer: here nothing yet
    for image, picture, mask in ((deep, 128, 128), (clear, 255, 0), (brushed, 255, 0)):
        assert (np.asarray(read_pictures("image", image)[0]) == picture).all()
        assert (np.asarray(read_masks("mask_image", image)[0]) == mask).all()
    with pytest.raises(UserError, match=r"image holds a picture that cannot be read .its values are floating-point"):
        read_pictures("image", Image.new("F", (4, 4)))


def test_images_are_upright():
    image = Image.new("RGB", (4, 6))
    image.getexif()[0x0112] = 6  # held sideways
    assert size_of(read_pictures("image", image)) == (4, 6)


def test_what_is_given_is_left_as_it_was():
    array = np.full((4, 4, 3), -1.0)
    read_pictures("image", array)
    assert (array == -1).all()


def test_a_mask_of_a_batch():
    masks = np.zeros((3, 4, 6))
    masks[1] = 1
    read = read_masks("mask_image", masks)
    assert read.shape == (3, 1, 4, 6) and size_of(read) == (4, 6) and read[1].all() and not read[[0, 2]].any()


def test_sizes_are_rounded_down_or_as_asked_for():
    assert size_to_draw((37, 64), None, None, 8) == (32, 64)
    assert size_to_draw((3, 64), None, 16, 8) == (8, 16)
    with pytest.raises(UserError, match=r"height is 30; .* the nearest is 32"):
        size_to_draw((37, 64), 30, None, 8)
    with pytest.raises(UserError, match=r"width is 16000; .* at most 8192; the nearest is 8192"):
        size_to_draw((37, 16000), None, None, 8)
