"""From an image stock Diffusers draws the same, of the same components and the same seed."""

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from pipelines import LatentDiffusionImg2ImgPipeline, LatentDiffusionInpaintPipeline, LatentDiffusionVariationPipeline

ABSENT = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
CASES = {
    "one": {"prompt": "a cat"},
    "batch": {"prompt": ["a cat", "two dogs"]},
    "weak": {"prompt": "a cat", "strength": 0.3},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0},
    "negative": {"prompt": "a cat", "negative_prompt": "a dog"},
    "euler": {"prompt": "a cat", "scheduler": EulerDiscreteScheduler},
    "heun": {"prompt": "a cat", "scheduler": HeunDiscreteScheduler},
    "dpm": {"prompt": "a cat", "scheduler": DPMSolverMultistepScheduler},
    "unipc": {"prompt": "a cat", "scheduler": UniPCMultistepScheduler},
    "lms": {"prompt": "a cat", "scheduler": LMSDiscreteScheduler},
}


def stock(kind, pipe):
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    theirs = kind(**{name: getattr(pipe, name) for name in names}, **ABSENT)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def difference(ours, theirs, case, **settings):
    """The largest, over all pixels, of pictures that are not flat."""
    case = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np", **settings, **case}
    if kind := case.pop("scheduler", None):
        ours.scheduler = theirs.scheduler = kind.from_config(theirs.scheduler.config)
    images = [pipe(**case, generator=torch.Generator().manual_seed(3)).images for pipe in (ours, theirs)]
    assert images[1].std() > 0.01 and len(images[0]) == len(images[1])
    largest = np.abs(images[0] - images[1]).max()
    print(f"largest difference {largest:.2e} = {largest * 255:.4f}/255")
    return largest


@pytest.fixture
def image_to_image(pipe_without_prior):
    ours = LatentDiffusionImg2ImgPipeline.from_pipe(pipe_without_prior)
    ours.set_progress_bar_config(disable=True)
    return ours


@pytest.fixture(params=[4, 9])
def inpainting(request, pipe_without_prior):
    """With a U-Net that does not read the mask, and with one that does."""
    ours = LatentDiffusionInpaintPipeline.from_pipe(pipe_without_prior)
    if request.param == 9:
        torch.manual_seed(2)
        config = {key: value for key, value in ours.unet.config.items() if not key.startswith("_")}
        ours.unet = UNet2DConditionModel(**config | {"in_channels": 9}).eval()
    ours.set_progress_bar_config(disable=True)
    return ours


@pytest.mark.parametrize("name", CASES)
def test_image_to_image(image_to_image, photos, name):
    theirs = stock(StableDiffusionImg2ImgPipeline, image_to_image)
    assert difference(image_to_image, theirs, CASES[name], image=photos[0]) <= 1 / 255


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "signed", "list"])
def test_image_to_image_reads_images_alike(image_to_image, photos, kind):
    array = np.asarray(photos[0], dtype=np.float32) / 255
    image = {
        "pil": photos[0],
        "np": array,
        "pt": torch.from_numpy(array).permute(2, 0, 1),
        "signed": torch.from_numpy(array).permute(2, 0, 1)[None] * 2 - 1,
        "list": [photos[0]],
    }[kind]
    theirs = stock(StableDiffusionImg2ImgPipeline, image_to_image)
    assert difference(image_to_image, theirs, CASES["one"], image=image) <= 1 / 255


def test_image_to_image_scales_odd_sizes_alike(image_to_image, photos):
    theirs = stock(StableDiffusionImg2ImgPipeline, image_to_image)
    assert difference(image_to_image, theirs, CASES["one"], image=photos[0].resize((27, 21))) <= 1 / 255


@pytest.mark.parametrize("name", CASES)
def test_inpainting(inpainting, photos, mask, name):
    inpaint = {"image": photos[0], "mask_image": mask, "height": 16, "width": 16}
    theirs = stock(StableDiffusionInpaintPipeline, inpainting)
    ours = lambda **settings: inpainting(**settings, composite=False)  # noqa: E731 (stock has no such option)
    if kind := CASES[name].get("scheduler"):
        inpainting.scheduler = theirs.scheduler = kind.from_config(theirs.scheduler.config)
    case = {key: value for key, value in CASES[name].items() if key != "scheduler"}
    assert difference(ours, theirs, case, **inpaint) <= 1 / 255


def stock_unclip(ours):
    names = set(ours.components) - {"prior", "prior_scheduler", "prior_tokenizer", "prior_text_encoder"}
    theirs = StableUnCLIPImg2ImgPipeline(**{name: getattr(ours, name) for name in names})
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.mark.parametrize("settings", [{}, {"prompt": "a cat"}, {"noise_level": 300}, {"guidance_scale": 1.0}])
def test_variations(family, photos, settings):
    ours = family["LatentDiffusionVariationPipeline"]
    assert difference(ours, stock_unclip(ours), settings, image=photos[0], height=16, width=16) <= 1 / 255


def test_the_folder_of_stable_unclips_img2img_is_opened_and_written(family, photos, tmp_path):
    theirs = stock_unclip(family["LatentDiffusionVariationPipeline"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LatentDiffusionVariationPipeline.from_pretrained(tmp_path / "theirs")
    ours.set_progress_bar_config(disable=True)
    assert ours.prior is None
    size = {"image": photos[0], "height": 16, "width": 16}
    assert difference(ours, theirs, {}, **size) <= 1 / 255
    ours.save_pretrained(tmp_path / "ours")
    again = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableUnCLIPImg2ImgPipeline
    assert difference(ours, again, {}, **size) <= 1 / 255
