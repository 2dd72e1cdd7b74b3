"""Components that several pipelines share, in the precision that each is in."""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ldm.errors import UserError
from pipelines import LatentDiffusionImg2ImgPipeline, LatentDiffusionInpaintPipeline, LatentDiffusionPipeline

FAST = {"num_inference_steps": 2, "guidance_scale": 4.0, "guidance_rescale": 0.5, "output_type": "pt"}
PRIOR = {"prior_num_inference_steps": 2, "num_prior_samples": 1}
INPUTS = {
    "LatentDiffusionPipeline": {"latents": 1, "prompt": "a cat", **PRIOR},
    "LatentDiffusionImg2ImgPipeline": {"image": 0, "prompt": "a cat", **PRIOR},
    "LatentDiffusionInpaintPipeline": {"latents": 1, "image": 0, "mask_image": 0, "prompt": "a cat", **PRIOR},
    "LatentDiffusionVariationPipeline": {"latents": 1, "image": 0},
    "LatentDiffusionInterpolationPipeline": {"latents": 2, "prompt": ["a cat", "a dog"], "num_frames": 3, **PRIOR},
    "LatentDiffusionTextDiffPipeline": {"latents": 1, "image": 0, "prompt": "a cat", "num_frames": 3},
}
"""What each pipeline draws from; latents by their number."""


@pytest.fixture
def copied(pipe) -> LatentDiffusionPipeline:
    own = LatentDiffusionPipeline(**copy.deepcopy(pipe.components))
    own.set_progress_bar_config(disable=True)
    return own


def test_sharing_leaves_the_precision_and_the_settings(copied):
    copied.to(torch.float16).default_settings = {"num_inference_steps": 7}
    again = LatentDiffusionImg2ImgPipeline.from_pipe(copied)
    assert again.unet is copied.unet and again.unet.dtype == again.vae.dtype == again.prior.dtype == torch.float16
    assert again.default_settings["num_inference_steps"] == 7


def test_sharing_leaves_each_component_its_own_precision(copied):
    copied.to(torch.float16).vae.to(torch.float32)
    again = LatentDiffusionInpaintPipeline.from_pipe(copied)
    assert again.vae is copied.vae and (again.vae.dtype, again.unet.dtype) == (torch.float32, torch.float16)
    assert LatentDiffusionInpaintPipeline.from_pipe(copied, dtype=torch.float16).vae.dtype == torch.float16


def test_sharing_wants_every_component_and_no_code(pipe):
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(UserError, match=r"a DDIMPipeline has no 'vae'; give vae="):
        LatentDiffusionPipeline.from_pipe(DDIMPipeline(unet, DDIMScheduler()))
    with pytest.raises(UserError, match="unknown argument 'custom_pipeline'"):
        LatentDiffusionPipeline.from_pipe(pipe, custom_pipeline="somebody/code")


@pytest.mark.parametrize("name", INPUTS)
def test_a_half_unet_beside_others_in_single_precision_draws(family, name, photos, mask):
    """Whatever is given and however guidance is set, the U-Net reads its own precision."""
    single = family[name]
    half = type(single)(**single.components | {"unet": copy.deepcopy(single.unet).to(torch.bfloat16)})
    half.set_progress_bar_config(disable=True)
    inputs = INPUTS[name]
    given = {"image": photos[0], "mask_image": mask}
    if "latents" in inputs:
        given["latents"] = torch.randn(inputs["latents"], 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = FAST | inputs | {part: given[part] for part in given if part in inputs}
    drawn, expected = (pipe(**settings, generator=torch.Generator().manual_seed(0)).images for pipe in (half, single))
    assert drawn.std() > 0.01 and (drawn - expected).abs().mean() < 0.05


def test_half_precision_throughout_with_noise_in_single(copied):
    noise = {"latents": torch.randn(1, 4, 8, 8), "prior_latents": torch.randn(1, 16)}
    images = copied.to(torch.bfloat16)("a cat", **noise, **FAST, **PRIOR).images
    assert images.dtype == torch.bfloat16 and images.isfinite().all()
