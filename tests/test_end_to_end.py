"""All four stages on drawn scenes, by the README's commands: from nothing to pictures of captions never seen."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from ldm.data.shapes import compare, is_held_out, make_scene
from pipelines import LatentDiffusionPipeline

ROOT = Path(__file__).parents[1]
CAPTIONS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder that the five scripts and `ldm assemble` leave, each run as its own process."""
    root = tmp_path_factory.mktemp("shapes")
    runs = {stage: f"{stage}={root / stage}" for stage in ("clip", "autoencoder", "prior", "cache")}
    for script, name, reads in (
        ("train_clip", "clip", []),
        ("train_autoencoder", "autoencoder", []),
        ("cache_latents", "cache", [runs["clip"], runs["autoencoder"]]),
        ("train_prior", "prior", [runs["clip"], runs["cache"]]),
        ("train_ldm", "ldm", [runs["clip"], runs["autoencoder"], runs["cache"], runs["prior"]]),
    ):
        config = ROOT / "configs" / "shapes" / f"{name}.yaml"
        command = [sys.executable, ROOT / "train" / f"{script}.py", "--config", config, f"output_dir={root / name}"]
        subprocess.run([*command, *reads], check=True, cwd=root)
    stages = {"clip": "clip", "autoencoder": "autoencoder", "prior": "prior", "unet": "ldm"}
    options = [text for stage, name in stages.items() for text in (f"--{stage}", str(root / name))]
    subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "assemble", *options, "--output", str(root / "model")],
        check=True,
        cwd=root,
    )
    return root / "model"


def test_draws_what_captions_never_seen_say(model):
    captions = []
    for number in range(10_000):
        caption = make_scene(1, number).caption
        if is_held_out(caption) and caption not in captions:
            captions.append(caption)
        if len(captions) == CAPTIONS:
            break
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(CAPTIONS)]
    images = pipe(captions, generator=generators).images
    seen = [compare(image, caption) for image, caption in zip(images, captions, strict=True)]
    for name in ("colour", "shape", "size", "position"):
        print(f"{name}: {sum(getattr(agreement, name) for agreement in seen)} of {CAPTIONS}")
    right = sum(agreement.colour and agreement.shape for agreement in seen)
    print(f"right colour and right shape: {right} of {CAPTIONS}")
    assert right >= 0.8 * CAPTIONS


def test_stock_diffusers_draws_the_same(model):
    settings = {"num_inference_steps": 10, "guidance_scale": 2.0, "prior_num_inference_steps": 10}
    caption = "a small red circle left of a large blue square"
    ours = LatentDiffusionPipeline.from_pretrained(model)
    stock = DiffusionPipeline.from_pretrained(model)
    pictures = []
    for pipe, further in ((ours, {"num_prior_samples": 1, "noise_level": 0, "prior_guidance_scale": 4.0}), (stock, {})):
        pipe.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        pictures.append(pipe(caption, generator=draw, output_type="np", **settings, **further).images[0])
    assert abs(pictures[0] - pictures[1]).max() <= 1 / 255
