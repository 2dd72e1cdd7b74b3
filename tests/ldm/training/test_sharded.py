"""What a launcher may ask for; divided weights themselves are trained in tests/train/test_two_processes.py."""

import pytest

from ldm.config import TrainingConfig
from ldm.errors import UserError
from ldm.training import sharded


@pytest.mark.parametrize(
    ("environment", "can_shard", "on_cpu", "words"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"},
            False,
            True,
            "for the U-Net of train_ldm.py",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, False, False, "for the U-Net of train_ldm.py"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, True, True, "fsdp_version 1: only FSDP2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, True, True, "on accelerators only"),
    ],
)
def test_what_cannot_be_divided_is_refused(monkeypatch, environment, can_shard, on_cpu, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        sharded.check(TrainingConfig(), can_shard, on_cpu)


@pytest.mark.parametrize("launched_with", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_muon_needs_whole_matrices(monkeypatch, launched_with):
    sharded.check(TrainingConfig(optimizer="muon"), True, False)
    monkeypatch.setenv(launched_with, "true")
    with pytest.raises(UserError, match="optimizer muon: needs whole matrices"):
        sharded.check(TrainingConfig(optimizer="muon"), True, False)


def test_deepspeed_is_told_no_precision(monkeypatch):
    assert sharded.mixed_precision("bf16") == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert sharded.mixed_precision("bf16") == "no"
    with pytest.raises(UserError, match="precision fp16: not with DeepSpeed"):
        sharded.mixed_precision("fp16")
