"""Checkpoints: what is written is read back, damage is seen, the newest whole one is found."""

import os
import resource
import signal

import pytest
import torch

from ldm.errors import RunError
from ldm.training import checkpoint
from ldm.training.checkpoint import Checkpoint


def make(step):
    shared = torch.arange(6.0)
    return Checkpoint(
        step,
        {"model": {"a.weight": shared, "b.weight": shared[2:4]}, "optimizer": {"0.step": torch.tensor(float(step))}},
        {"note": "words"},
    )


def test_round_trip_even_of_tensors_that_share_memory(tmp_path):
    path = checkpoint.save(tmp_path, make(7), keep=2)
    loaded = checkpoint.load(path)
    assert path.name == "step-000007" and loaded.step == 7 and loaded.state == {"note": "words"}
    assert loaded.read("model")["b.weight"].tolist() == [2.0, 3.0]
    assert loaded.read("optimizer")["0.step"].item() == 7.0
    assert not list(tmp_path.glob(".*"))


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100, 1_000_000):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000100", "step-1000000"]
    assert checkpoint.newest(tmp_path).name == "step-1000000"


def test_a_later_damaged_one_does_not_crowd_out_what_is_written(tmp_path, capsys):
    checkpoint.save(tmp_path, make(10), keep=1)
    later = checkpoint.save(tmp_path, make(20), keep=2)
    (later / "model.safetensors").unlink()
    assert checkpoint.newest(tmp_path).name == "step-000010"
    checkpoint.save(tmp_path, make(15), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-000015"
    checkpoint.save(tmp_path, make(25), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000025"]


def test_folders_of_other_names_are_left_alone(tmp_path):
    (tmp_path / "step-000005-before-the-accident").mkdir()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, make(7), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-000007" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, capsys, damage):
    checkpoint.save(tmp_path, make(1), keep=3)
    newest = checkpoint.save(tmp_path, make(2), keep=3)
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncate":
        weights.write_bytes(content[:-3])
    elif damage == "flip":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "delete":
        weights.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    assert checkpoint.newest(tmp_path).name == "step-000001"
    assert "step-000002 is damaged" in capsys.readouterr().err


def test_an_unfinished_write_is_never_found(tmp_path):
    (tmp_path / ".step-000009.tmp").mkdir()
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None
    checkpoint.save(tmp_path, make(9), keep=1)
    assert checkpoint.newest(tmp_path).name == "step-000009"


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        path = checkpoint.save(tmp_path, make(1), keep=1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o644"}


def test_a_full_disk_leaves_the_earlier_ones_alone(tmp_path):
    """The system refuses files of more than 100 bytes, as it would refuse any on a full disk."""
    checkpoint.save(tmp_path, make(1), keep=1)
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError, match=r"step-000002 could not be written: .*earlier ones are intact"):
            checkpoint.save(tmp_path, make(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.newest(tmp_path).name == "step-000001"


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ROOM_TO_SPARE", 2**62)
    with pytest.raises(RunError, match=r"could not be written: it takes 0 MiB, and [\d,]+ MiB are free"):
        checkpoint.save(tmp_path, make(2), keep=1)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_told_in_words(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(RunError, match="could not be written: File exists"):
        checkpoint.save(tmp_path / "checkpoints", make(1), keep=1)
