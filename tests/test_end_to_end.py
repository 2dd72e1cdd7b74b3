"""All four stages on drawn scenes, by the README's commands: from nothing to pictures of captions never seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from pipelines import LatentDiffusionPipeline

SCRIPT = Path(__file__).parent / "benchmarks" / "shapes_end_to_end.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the benchmark leaves: the runs, the assembled model, and what percentage of pictures show what."""
    output = tmp_path_factory.mktemp("shapes") / "output"
    subprocess.run([sys.executable, SCRIPT, "--output", output], check=True)
    return output


def test_draws_what_captions_never_seen_say(folder):
    report = json.loads((folder / "report.json").read_text())
    print(report)
    assert report["colour and shape"] >= 80


def test_stock_diffusers_draws_the_same(folder):
    settings = {"num_inference_steps": 10, "guidance_scale": 2.0, "prior_num_inference_steps": 10}
    caption = "a small red circle left of a large blue square"
    ours = LatentDiffusionPipeline.from_pretrained(folder / "model")
    stock = DiffusionPipeline.from_pretrained(folder / "model")
    pictures = []
    for pipe, further in ((ours, {"num_prior_samples": 1, "noise_level": 0, "prior_guidance_scale": 4.0}), (stock, {})):
        pipe.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        pictures.append(pipe(caption, generator=draw, output_type="np", **settings, **further).images[0])
    assert abs(pictures[0] - pictures[1]).max() <= 1 / 255
