"""Runs that stream tar shards: interrupted and resumed they end as the uninterrupted ones, each process reads its own
shards, and what cannot be gone on with is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.config import DataConfig, RunConfig, TrainingConfig
from ldm.data import shapes
from ldm.data.batches import micro_batches, open_data
from ldm.data.order import Share
from ldm.training.checkpoint import Saved

ROOT = Path(__file__).parents[2]
DIGITS = ["--config", str(ROOT / "configs" / "digits" / "ldm.yaml"), "data.image_size=8", "data.caption_templates=[]"]
SMALL_UNET = ["model.block_out_channels=[8,16]", "model.norm_num_groups=4", "model.attention_head_dim=4"]
STEPS = ["training.max_steps=8", "training.checkpoint_every=3", "training.sample_every=8", "training.log_every=1"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_tar):
    """Four shards of six scenes, one in each of which is damaged: three epochs and a bit of eight steps of eight."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        members: dict[str, bytes | str | Image.Image] = {}
        for number in range(6 * shard, 6 * shard + 6):
            scene = shapes.make_scene(0, number)
            picture = b"damaged" if number % 6 == shard else shapes.draw(scene, 32)
            members |= {f"{number:03d}.png": picture, f"{number:03d}.txt": scene.caption}
        write_tar(folder / f"shard-{shard}.tar", members)
    return str(folder / "shard-{0..3}.tar")


@pytest.fixture
def arguments_for(runs, arguments_of, source):
    """(stage, output, *further) -> the command line of a small stage that streams."""
    data = [f"data.source={source}", "data.caption_column=txt", "data.streaming=true", "data.shuffle_buffer=4",
            "data.max_images=null", "data.max_bad_fraction=0.2"]  # fmt: skip

    def arguments(stage: str, output: Path, *further: str) -> list[str]:
        if stage == "ldm":
            small = [*SMALL_UNET, "training.batch_size=8", "training.precision=fp32", "num_train_timesteps=20"]
            return [*DIGITS, f"output_dir={output}", *small, *data, *STEPS, *further]
        return arguments_of(stage, runs, output, *data, *STEPS, *further)

    return arguments


def lose_steps(folder: Path) -> None:
    """Leaves a run as it was after step 6."""
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-000008")


def assert_same(one: Path, two: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        path = f"checkpoints/step-000008/{name}.safetensors"
        first, second = load_file(one / path), load_file(two / path)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    state = [(folder / "checkpoints/step-000008/state.json").read_text() for folder in (one, two)]
    assert state[0] == state[1]


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "ldm"])
def test_a_resumed_stream_ends_as_the_uninterrupted_one(arguments_for, run_script, tmp_path, stage):
    assert run_script(stage, arguments_for(stage, tmp_path / "whole")) == 0
    assert list((tmp_path / "whole" / "samples").iterdir()) and (tmp_path / "whole" / "model").is_dir()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    lose_steps(tmp_path / "run")
    assert run_script(stage, arguments_for(stage, tmp_path / "run", "data.num_workers=2", "--resume")) == 0
    assert_same(tmp_path / "whole", tmp_path / "run")
    position = json.loads((tmp_path / "run/checkpoints/step-000008/state.json").read_text())["stream"]["positions"][0]
    assert position["epoch"] == 3 and position["num_read"] - position["num_bad"] == 64


def test_two_processes_read_shards_of_their_own_and_know_where_each_was(arguments_for, fails, pair, source, tmp_path):
    said = pair.run("clip", arguments_for("clip", tmp_path / "run"))
    before, after = (
        json.loads((tmp_path / "run" / "checkpoints" / f"step-00000{step}" / "state.json").read_text())
        for step in (6, 8)
    )
    for rank in range(2):  # a process is told of the damaged pictures that it reads
        lines = [line for line in said[rank].splitlines() if line.startswith("warning: sample")]
        assert {line.split("shard-")[1][0] for line in lines} == ({"0", "2"}, {"1", "3"})[rank]

        # From where it was after step 6, two steps lead to where it was after step 8
        data = DataConfig(source=source, caption_column="txt", streaming=True, shuffle_buffer=4, max_bad_fraction=0.2)
        config = RunConfig(output_dir="", data=data, training=TrainingConfig(batch_size=8, max_steps=8))
        resumed = Saved(tmp_path, 6, before)
        *_, last = micro_batches(open_data(data, 0, 2), config, Share(8, 1, 2, rank), resumed)
        assert asdict(last["position"]) == after["stream"]["positions"][rank] != before["stream"]["positions"][rank]

    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    lose_steps(tmp_path / "alone")
    line = fails("clip", arguments_for("clip", tmp_path / "alone", "--resume"))
    assert "2 processes were reading" in line and "start as many as before" in line


def test_a_micro_batch_is_found_from_the_first_sample(arguments_for, run_script, tmp_path):
    found = "training.find_micro_batch=true"
    for name, further in (("plain", ()), ("searched", (found,))):
        assert run_script("ldm", arguments_for("ldm", tmp_path / name, *further)) == 0
    one, two = (load_file(tmp_path / n / "checkpoints/step-000008/model.safetensors") for n in ("plain", "searched"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_what_cannot_be_streamed_is_told(arguments_for, arguments_of, runs, fails, tmp_path):
    assert "class_conditional" in fails("ldm", arguments_for("ldm", tmp_path / "run", "class_conditional=true"))
    streamed = ["data.source=shapes", "data.streaming=true", "data.max_images=null"]
    assert "no tar shards, parquet files" in fails("cache", arguments_of("cache", runs, tmp_path / "run", *streamed))
    assert not (tmp_path / "run").exists()
