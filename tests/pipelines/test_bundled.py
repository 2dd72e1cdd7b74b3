"""The model that the package ships: its size, its card, and the same picture in stock Diffusers."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPPipeline
from PIL import Image
from safetensors import safe_open

import pipelines
from pipelines import LatentDiffusionPipeline

FOLDER = Path(pipelines.__file__).parent / "default"
PROMPTS = ["a photo of a cat", "a truck"]
STOCK = """
import sys
for name in ("ldm", "pipelines"):
    sys.modules[name] = None  # importing it fails
import json, numpy as np, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
settings = json.loads(sys.argv[2])
images = pipe(sys.argv[4:], generator=torch.Generator().manual_seed(7), output_type="np", **settings).images
np.save(sys.argv[3], images)
"""


@pytest.fixture(scope="module")
def bundled():
    pipe = LatentDiffusionPipeline.default()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_is_small_whole_and_fp16():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_stock_diffusers_draws_the_same(bundled, tmp_path):
    """With the model's own settings, but for the second sample of the prior, which stock does not draw."""
    known = inspect.signature(StableUnCLIPPipeline.__call__).parameters
    settings = {name: value for name, value in bundled.default_settings.items() if name in known}
    assert len(settings) == 5
    subprocess.run(
        [sys.executable, "-P", "-c", STOCK, FOLDER, json.dumps(settings), tmp_path / "images.npy", *PROMPTS],
        check=True,
        cwd=tmp_path,
    )
    theirs = np.load(tmp_path / "images.npy")
    generator = torch.Generator().manual_seed(7)
    ours = bundled(PROMPTS, generator=generator, output_type="np", num_prior_samples=1, **settings).images
    difference = np.abs(theirs - ours).max()
    print(f"largest difference {difference:.2e} = {difference * 255:.4f}/255")
    assert theirs.std() > 0.1 and difference <= 1 / 255


def test_pictures_follow_the_prompt(bundled):
    """Ships lie in blue and grey, frogs in greens and browns: told by colour alone, more often than not."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    images = bundled(
        ["a photo of a ship"] * 8 + ["a photo of a frog"] * 8, generator=generators, output_type="pt"
    ).images
    blueness = (images[:, 2] - images[:, :2].mean(dim=1)).mean(dim=(1, 2))
    assert blueness[:8].mean() > blueness[8:].mean() + 0.05


def test_draws_what_the_readme_says(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "generate", "a photo of a cat", "--output", "cat.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stderr
    assert Image.open(tmp_path / "cat.png").size == (32, 32)


def test_says_what_it_knows_when_asked_for_something_else(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "generate", "a castle", "--output", "castle.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("note:")]
    assert done.returncode == 0 and "cat" in note and "truck" in note
