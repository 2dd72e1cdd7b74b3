import json

import pytest
import torch
import wandb
from PIL import Image

from ldm.config import TrainingConfig
from ldm.training.tracking import Tracker


@pytest.fixture
def logged(tmp_path):
    return lambda: [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def run(folder, first, last, is_main=True):
    """Steps first + 1 … last, whose loss is the number of the step, logged every second one."""
    tracker = Tracker(folder, first, TrainingConfig(max_steps=8, batch_size=4, log_every=2), is_main)
    for step in range(first + 1, last + 1):
        tracker.collect(loss=torch.tensor(float(step)))
        tracker.step(step, learning_rate=0.5)
    tracker.close()


def test_means_since_the_last_line(tmp_path, logged):
    run(tmp_path, 0, 6)
    assert [(line["step"], line["loss"]) for line in logged()] == [(1, 1.0), (2, 2.0), (4, 3.5), (6, 5.5)]


def test_the_last_step_is_logged_whatever_its_number(tmp_path, logged):
    tracker = Tracker(tmp_path, 0, TrainingConfig(max_steps=5, log_every=3), True)
    for step in range(1, 6):
        tracker.collect(loss=torch.tensor(float(step)))
        tracker.step(step)
    tracker.close()
    assert [(line["step"], line["loss"]) for line in logged()] == [(1, 1.0), (3, 2.5), (5, 4.5)]


def test_speed_and_memory_are_there(tmp_path, logged):
    run(tmp_path, 0, 4)
    for line in logged():
        assert line["samples_per_second"] > 0
        assert 0.01 < line["memory_gib"] < 1000


def test_weights_and_biases_gets_what_the_file_gets(tmp_path, logged, monkeypatch):
    """wandb itself, without a network; its own file of the run holds the values."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.yaml").write_text("training:\n  learning_rate: 0.0625\n")
    settings = TrainingConfig(max_steps=8, batch_size=4, log_every=1, wandb_project="shapes")
    for first in (0, 2):
        tracker = Tracker(tmp_path, first, settings, True)
        tracker.collect(loss=torch.tensor(0.123456))
        tracker.step(first + 1)
        tracker.pictures(first + 1, torch.zeros(2, 3, 8, 8), columns=2)
        tracker.close()
    wandb.teardown()  # its own process writes the last of it
    identity = (tmp_path / "wandb-id").read_text()
    stored = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(stored) == 2 and all(identity in path.name for path in stored)  # the resumed run is the same run
    for path in stored:
        content = path.read_bytes()
        assert b"learning_rate" in content and b"0.0625" in content
        assert f"{logged()[0]['loss']:.6g}"[:7].encode() in content and b"samples_per_second" in content
        assert list(path.parent.rglob("*.png"))


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path, logged):
    run(tmp_path, 0, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # cut short by a crash
    run(tmp_path, 4, 8)
    assert [line["step"] for line in logged()] == [1, 2, 4, 6, 8]
    assert logged()[-1]["loss"] == 7.5


def test_other_processes_write_nothing(tmp_path):
    run(tmp_path, 0, 4, is_main=False)
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_a_grid(tmp_path):
    tracker = Tracker(tmp_path, 0, TrainingConfig(), True)
    images = torch.stack([torch.full((3, 6, 6), value) for value in (-1.0, 1.0, 0.0, 3.0)])
    tracker.pictures(5, images, columns=2)
    tracker.close()
    grid = Image.open(tmp_path / "samples" / "step-000005.png").convert("L")
    assert grid.size == (2 * 6 + 3 * 2, 2 * 6 + 3 * 2)
    assert [grid.getpixel(place) for place in ((4, 4), (12, 4), (4, 12), (12, 12))] == [0, 255, 128, 255]
