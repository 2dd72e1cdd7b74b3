"""A run that lost its last steps and resumed ends as the uninterrupted one did, bit for bit."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from ldm.training import randomness


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "prior", "ldm"])
def test_resumed_run_equals_the_uninterrupted_one(runs, arguments_of, run_script, logged, tmp_path, stage):
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


@pytest.fixture(scope="module")
def six_steps(runs, arguments_of, run_script, tmp_path_factory):
    """Twice over 24 samples in steps of two micro-batches each: its overrides, and the run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    overrides = ["training.max_steps=6", "training.gradient_accumulation_steps=2", "training.checkpoint_every=6"]
    assert run_script("prior", arguments_of("prior", runs, folder, *overrides)) == 0
    return overrides, folder


@pytest.mark.parametrize(
    ("micro_batch", "step"),
    [(1, 1), (4, 2), (6, 3), (7, 4), (12, 6)],
    ids=["first", "mid-accumulation", "end of an epoch", "start of an epoch", "last"],
)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(
    six_steps, runs, arguments_of, run_script, tmp_path, monkeypatch, micro_batch, step
):
    """A real SIGTERM while a given micro-batch is trained; the resumed run has a data worker, and no stop."""
    overrides, whole = six_steps
    seed_dropout, seen = randomness.seed_dropout, []

    def told_to_stop(*keys):
        seen.append(keys)
        if len(seen) == micro_batch:
            signal.raise_signal(signal.SIGTERM)
        seed_dropout(*keys)

    monkeypatch.setattr(randomness, "seed_dropout", told_to_stop)
    arguments = arguments_of("prior", runs, tmp_path / "run", *overrides)
    assert run_script("prior", arguments) == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert run_script("prior", [*arguments, "data.num_workers=1", "--resume"]) == 0
    for name in ("model", "ema", "optimizer"):
        path = f"checkpoints/step-000006/{name}.safetensors"
        once, again = load_file(whole / path), load_file(tmp_path / "run" / path)
        assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once), name
