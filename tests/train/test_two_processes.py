"""Two real processes that talk over gloo: they train one model, and it is the one that a single process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = {"ldm": "train_ldm", "autoencoder": "train_autoencoder", "clip": "train_clip"}
FURTHER = {"ldm": ["sample_prompts=[]"], "autoencoder": ["adversarial_weight=0"], "clip": []}


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "ldm"])
def test_two_processes_train_what_one_does(runs, arguments_of, run_script, tmp_path, stage):
    assert run_script(stage, arguments_of(stage, runs, tmp_path / "one", *FURTHER[stage])) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    arguments = arguments_of(stage, runs, tmp_path / "two", *FURTHER[stage])
    subprocess.run(
        [*command, ROOT / "train" / f"{SCRIPT[stage]}.py", *arguments],
        check=True,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    one, two = (load_file(tmp_path / name / "checkpoints/step-000004/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)  # Adam's first steps magnify rounding

    # Each process logs the loss of its own half; all of CLIP's batch is in every loss
    name = {"clip": "clip_loss", "autoencoder": "l1", "ldm": "loss"}[stage]
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if name in line] == [1, 2, 3, 4]
    assert torch.isfinite(torch.tensor([line[name] for line in lines if name in line])).all()
