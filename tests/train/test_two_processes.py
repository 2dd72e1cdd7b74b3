"""Two real processes that talk over gloo: they train one model, and it is the one that a single process trains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

FURTHER = {
    "ldm": [
        "sample_prompts=[]",
        "training.max_steps=20",
        "training.checkpoint_every=20",
        "training.sample_every=20",
        "model.dropout=0.1",
    ],
    "ldm_text": ["sample_prompts=[]"],
    "autoencoder": ["adversarial_weight=0"],
    "clip": [],
}
HALVES = "training.gradient_accumulation_steps=2"
LOSS = {"clip": "clip_loss", "autoencoder": "l1", "ldm": "loss", "ldm_text": "loss"}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D,Transformer2DModel",
}


def losses(folder, stage):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[LOSS[stage]] for line in lines if LOSS[stage] in line], dtype=torch.float64)


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "ldm", "ldm_text"])
def test_two_processes_train_what_one_does(runs, arguments_of, run_script, pair, tmp_path, stage):
    """The U-Net in 20 steps, against one process that accumulates over two halves."""
    alone = [*FURTHER[stage], HALVES] if stage == "ldm" else FURTHER[stage]
    script = stage.removesuffix("_text")
    assert run_script(script, arguments_of(stage, runs, tmp_path / "one", *alone)) == 0
    pair.run(script, arguments_of(stage, runs, tmp_path / "two", *FURTHER[stage]))
    last = sorted(path.name for path in tmp_path.glob("one/checkpoints/*"))[-1]
    one, two = (load_file(tmp_path / name / "checkpoints" / last / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)  # Adam's first steps magnify rounding
    assert len(losses(tmp_path / "one", stage)) == (20 if stage == "ldm" else 4)
    torch.testing.assert_close(losses(tmp_path / "two", stage), losses(tmp_path / "one", stage), rtol=1e-5, atol=0)


def test_divided_weights_train_resume_and_come_together(runs, arguments_of, run_script, pair, tmp_path):
    """FSDP2: what one process trains; interrupted and resumed, the same bits; and one process goes on from it."""
    pair.run("ldm", arguments_of("ldm", runs, tmp_path / "two", "sample_prompts=[]"), **FSDP2)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-000004"
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert len(shards) == 2 and all(name.startswith("shard-") for name in shards)
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}
    for name in ("resumed", "alone"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-000004")
        shutil.rmtree(tmp_path / name / "model")
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoints" / "step-000004")
    (tmp_path / "resumed" / "checkpoints" / "step-000004" / shards[1]).unlink()
    arguments = arguments_of("ldm", runs, tmp_path / "resumed", "sample_prompts=[]", "--resume")
    assert "".join(pair.run("ldm", arguments, **FSDP2)).count("step-000004 is damaged") == 1
    assert run_script("ldm", arguments_of("ldm", runs, tmp_path / "alone", "sample_prompts=[]", "--resume")) == 0

    for shard in shards:
        once, again = (
            load_file(tmp_path / name / "checkpoints" / "step-000004" / shard) for name in ("two", "resumed")
        )
        assert once.keys() == again.keys() and len(once) > 100
        assert all(torch.equal(once[name], again[name]) for name in once), shard
    path = "model/unet/diffusion_pytorch_model.safetensors"
    alone = load_file(runs / "ldm" / path)
    for name in ("two", "resumed", "alone"):
        trained = load_file(tmp_path / name / path)
        assert trained.keys() == alone.keys()
        for key in alone:
            torch.testing.assert_close(trained[key], alone[key], rtol=0, atol=2e-3)
        torch.testing.assert_close(losses(tmp_path / name, "ldm"), losses(runs / "ldm", "ldm"), rtol=1e-5, atol=0)
    config = "model/unet/config.json"
    assert (tmp_path / "two" / config).read_text() == (runs / "ldm" / config).read_text()
