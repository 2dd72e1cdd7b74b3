import numpy as np
import pytest
import torch
from PIL import Image

FAST = {"num_inference_steps": 5, "prior_num_inference_steps": 2}


@pytest.fixture
def draw(family, photos, mask):
    def drawn(**settings):
        generator = torch.Generator().manual_seed(0)
        settings = {
            "prompt": "a cat",
            "image": photos[0],
            "mask_image": mask,
            "generator": generator,
            **FAST,
            **settings,
        }
        return family["LatentDiffusionInpaintPipeline"](**settings).images

    return drawn


def test_outside_of_the_mask_the_pixels_are_the_images_own(draw, photos, mask):
    white = np.asarray(mask) > 127
    own, drawn = np.asarray(photos[0]).astype(int), np.asarray(draw()[0]).astype(int)
    assert np.array_equal(drawn[~white], own[~white])
    assert np.abs(drawn[white] - own[white]).mean() > 5
    decoded = np.asarray(draw(composite=False)[0]).astype(int)
    assert np.array_equal(decoded[white], drawn[white]) and not np.array_equal(decoded[~white], own[~white])


def test_outside_of_the_mask_the_latents_end_as_the_images(draw, family, photos):
    latents = draw(output_type="latent")
    other = draw(output_type="latent", prompt="two dogs")
    assert torch.equal(latents[..., :4], other[..., :4]) and not torch.equal(latents[..., 4:], other[..., 4:])


def test_a_black_mask_keeps_all_and_a_white_one_nothing(draw, photos):
    kept = draw(mask_image=Image.new("L", (16, 16), 0), composite=True)[0]
    assert np.array_equal(np.asarray(kept), np.asarray(photos[0]))
    all_white = Image.new("L", (16, 16), 255)
    white = [np.asarray(draw(mask_image=all_white, image=photo)[0]) for photo in photos]
    assert np.array_equal(*white)  # from noise, and nothing of the image is put back


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_weaker_begins_from_the_image(draw, photos, strength):
    assert not np.array_equal(np.asarray(draw(strength=strength)[0]), np.asarray(draw()[0]))


def test_masks_of_every_kind_are_one(draw, mask):
    expected = np.asarray(draw()[0])
    array = np.asarray(mask) / 255
    kinds = [
        array,
        array.astype(bool),
        array.astype(np.uint8),
        array[None, ..., None],
        np.asarray(mask),
        torch.from_numpy(array),
        torch.from_numpy(array)[None, None],
        mask.convert("RGB"),
        [mask],
    ]
    for kind in kinds:
        assert np.array_equal(np.asarray(draw(mask_image=kind)[0]), expected)
