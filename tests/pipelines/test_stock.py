"""Stock Diffusers opens what this package saves, and draws the same."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
    StableUnCLIPPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback

from pipelines import LatentDiffusionPipeline

STEPS = {"num_inference_steps": 4, "output_type": "np"}
CASES = {
    "one": {"prompt": "a cat"},
    "batch": {"prompt": ["a cat", "two dogs"], "num_images_per_prompt": 2},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0},
    "guided": {"prompt": "a cat", "guidance_scale": 7.5},
    "negative": {"prompt": "a cat", "negative_prompt": "a dog", "guidance_scale": 3.0},
    "eta": {"prompt": "a cat", "eta": 0.7},
    "size": {"prompt": "a cat", "height": 24, "width": 32},
    "latents": {"prompt": "a cat", "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))},
    "generators": {"prompt": ["a cat", "two dogs"], "generator": (1, 2)},
}
PRIOR_CASES = CASES | {
    "noised": {"prompt": ["a cat", "two dogs"], "noise_level": 300},
    "prior unguided": {"prompt": "a cat", "prior_guidance_scale": 1.0},
    "prior guided": {"prompt": ["a cat", "two dogs"], "prior_guidance_scale": 6.0},
    "prior latents": {
        "prompt": "a cat",
        "prior_latents": torch.randn(1, 16, generator=torch.Generator().manual_seed(5)),
    },
}
SCRIPT = """
import sys
for name in ("ldm", "pipelines"):
    sys.modules[name] = None  # importing it fails
import numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.split(".")[0] in ("ldm", "pipelines") and sys.modules[name]]
image = pipe("a cat", num_inference_steps=3, prior_num_inference_steps=3, guidance_scale=2.0, output_type="np",
             generator=torch.Generator().manual_seed(0)).images
np.save(sys.argv[2], image)
"""


def draw(pipe, case: dict, **settings) -> np.ndarray:
    seeds = case.get("generator", 0)
    generator = (
        [torch.Generator().manual_seed(seed) for seed in seeds]
        if isinstance(seeds, tuple)
        else torch.Generator().manual_seed(seeds)
    )
    return pipe(**{"guidance_scale": 4.0, **STEPS, **settings, **case, "generator": generator}).images


def opened_by_stock(pipe, folder):
    pipe.save_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def stock(pipe, tmp_path_factory):
    return opened_by_stock(pipe, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stock_without_prior(pipe_without_prior, tmp_path_factory):
    return opened_by_stock(pipe_without_prior, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", PRIOR_CASES)
def test_same_picture_as_stable_unclip(pipe, stock, name):
    assert type(stock) is StableUnCLIPPipeline
    theirs = draw(stock, PRIOR_CASES[name], prior_num_inference_steps=5)
    ours = draw(pipe, PRIOR_CASES[name], prior_num_inference_steps=5, num_prior_samples=1)
    assert theirs.std() > 0.01
    assert np.abs(theirs - ours).max() <= 1 / 255


@pytest.mark.parametrize("name", CASES)
def test_same_picture_as_stable_diffusion(pipe_without_prior, stock_without_prior, name):
    assert type(stock_without_prior) is StableDiffusionPipeline
    assert np.abs(draw(stock_without_prior, CASES[name]) - draw(pipe_without_prior, CASES[name])).max() <= 1 / 255


def test_same_picture_with_a_callback_of_diffusers(pipe_without_prior, stock_without_prior):
    half_way = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}
    theirs, ours = (draw(pipe, CASES["one"], **half_way) for pipe in (stock_without_prior, pipe_without_prior))
    assert np.abs(theirs - ours).max() <= 1e-5
    assert np.abs(draw(pipe_without_prior, CASES["one"]) - ours).max() > 1e-4


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,  # its noise is not of standard deviation 1, nor that of the next two
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_same_picture_with_another_scheduler(pipe, tmp_path, scheduler):
    ours = LatentDiffusionPipeline(**pipe.components)
    ours.scheduler = scheduler.from_config(pipe.scheduler.config)
    ours.set_progress_bar_config(disable=True)
    theirs = opened_by_stock(ours, tmp_path / "model")
    assert type(theirs.scheduler) is scheduler
    case = CASES["negative"]
    difference = draw(theirs, case, prior_num_inference_steps=5) - draw(
        ours, case, prior_num_inference_steps=5, num_prior_samples=1
    )
    assert np.abs(difference).max() <= 1 / 255


def test_a_spacing_that_rounds_two_timesteps_to_one_is_drawn_to_its_end(pipe):
    """Stock Diffusers begins with the second of them, and asks for a step after the last."""
    ours = LatentDiffusionPipeline(**pipe.components)
    cosine = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    ours.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **cosine)
    ours.set_progress_bar_config(disable=True)
    image = draw(ours, CASES["one"], num_inference_steps=12, prior_num_inference_steps=2)
    assert len(set(ours.scheduler.timesteps.tolist())) < 12 and 0.01 < image.std() < 1


def test_stable_diffusions_own_folder_opens(stock_without_prior, pipe_without_prior, tmp_path):
    """Saved by stock itself, with its extra entries."""
    stock_without_prior.save_pretrained(tmp_path / "theirs")
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path / "theirs")
    ours.set_progress_bar_config(disable=True)
    assert ours.prior is None
    assert np.array_equal(draw(ours, CASES["one"]), draw(pipe_without_prior, CASES["one"]))


def test_opens_with_this_package_absent(pipe, tmp_path):
    own = LatentDiffusionPipeline(**pipe.components)
    own.default_settings = {"guidance_scale": 2.0}
    own.save_pretrained(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "image.npy")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "not expected" not in result.stderr and "ignored" not in result.stderr
    case = {"prompt": "a cat", "guidance_scale": 2.0, "num_inference_steps": 3}
    ours = draw(pipe, case, prior_num_inference_steps=3, num_prior_samples=1)
    assert np.abs(np.load(tmp_path / "image.npy") - ours).max() <= 1 / 255
