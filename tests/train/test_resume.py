"""A run that lost its last steps and resumed ends as the uninterrupted one did, bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "prior", "ldm"])
def test_resumed_run_equals_the_uninterrupted_one(runs, arguments_of, run_script, tmp_path, stage):
    shutil.copytree(runs / stage, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    assert run_script(stage, arguments_of(stage, runs, tmp_path / "run", "--resume")) == 0

    compared = 0
    for path in sorted((runs / stage).rglob("*.safetensors")):
        once, again = load_file(path), load_file(tmp_path / "run" / path.relative_to(runs / stage))
        assert once.keys() == again.keys()
        assert all(torch.equal(once[name], again[name]) for name in once), path
        compared += len(once)
    assert compared > 50

    def logged(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in ("samples_per_second", "memory_gib")}
                for line in lines]  # fmt: skip

    assert logged(tmp_path / "run") == logged(runs / stage)


@pytest.mark.parametrize("stage", ["autoencoder", "prior", "ldm"])
def test_accumulation_sees_the_same_samples_and_noise(runs, arguments_of, run_script, tmp_path, stage):
    """Two micro-batches of four are one batch of eight, but for the order of additions (and dropout, here off)."""
    further = {
        "autoencoder": ["adversarial_weight=0"],  # adaptive λ is a ratio of micro-batch gradients, not a mean
        "prior": ["model.dropout=0"],
        "ldm": ["sample_prompts=[]"],
    }[stage]
    for name, accumulation in (("whole", 1), ("halves", 2)):
        extra = [*further, f"training.gradient_accumulation_steps={accumulation}"]
        assert run_script(stage, arguments_of(stage, runs, tmp_path / name, *extra)) == 0

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        key = "l1" if stage == "autoencoder" else "loss"
        return torch.tensor([line[key] for line in map(json.loads, lines) if key in line], dtype=torch.float64)

    assert len(losses("whole")) == 4
    torch.testing.assert_close(losses("halves"), losses("whole"), rtol=1e-5, atol=0)


def test_another_seed_is_another_run(runs, arguments_of, run_script, tmp_path):
    assert run_script("prior", arguments_of("prior", runs, tmp_path / "run", "seed=1")) == 0
    path = "model/prior/diffusion_pytorch_model.safetensors"
    once, again = load_file(runs / "prior" / path), load_file(tmp_path / "run" / path)
    assert not torch.equal(once["proj_in.weight"], again["proj_in.weight"])
