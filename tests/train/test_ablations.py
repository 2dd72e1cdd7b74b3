"""The table of ablations, on a handful of pictures: a row is trained, drawn and judged once, however often it is asked
for."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

import ablations
from ldm.errors import UserError

SMALL = ["model.block_out_channels=[8,16,16]", "model.norm_num_groups=4", "model.attention_head_dim=2",
         "training.compile=false", "training.batch_size=8", "training.precision=fp32"]  # fmt: skip


@pytest.fixture
def photographs(tmp_path):
    """Noise in place of CIFAR-10: three pictures a class."""
    draw, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        encoded = []
        for _ in range(30):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(pa.table({"img": encoded, "label": [c % 10 for c in range(30)]}), folder / f"{split}.parquet")
    return folder


@pytest.fixture
def command(runs, photographs, tmp_path):
    """Of a table in tmp_path / "table", without its rows."""
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "cache").symlink_to(runs / "cache")  # a stage that has ended is not run again
    stages = [text for stage in ("autoencoder", "clip", "prior") for text in (f"--{stage}", str(runs / stage))]
    return ["ablations.py", "--output", str(tmp_path / "table"), *stages, "--data", str(photographs), *SMALL,
            "--steps=2", "--images=16", "--images-per-class=1"]  # fmt: skip


def test_rows_are_trained_and_judged_once(command, tmp_path, monkeypatch, capsys):
    command.append("--rows=base,average-0.1,guidance-1")
    monkeypatch.setattr(sys, "argv", command)
    ablations.main()
    told = capsys.readouterr().out
    assert told.count("\n") == 6 and "| guidance 1 |" in told
    measured = json.loads((tmp_path / "table" / "ablations.json").read_text())
    assert [row["name"] for row in measured] == ["base", "average-0.1", "guidance-1"]
    assert all(0 <= row["accuracy"] <= 1 and row["frechet_distance"] > 0 for row in measured)
    assert len({row["frechet_distance"] for row in measured}) == 3
    assert Image.open(tmp_path / "table" / "ablations.png").size[0] > 400

    monkeypatch.setattr(ablations, "judge", None)  # of which nothing is asked again
    ablations.main()
    assert capsys.readouterr().out == told
    monkeypatch.setattr(sys, "argv", [*command, "--images-per-class=2"])
    with pytest.raises(UserError, match="choose another --output"):
        ablations.main()


def test_a_row_with_its_own_clip_draws_with_its_own_prior(
    command, runs, arguments_of, run_script, tmp_path, monkeypatch
):
    table, own = tmp_path / "table", tmp_path / "table" / "slip"
    for row, stages in (("base", {"unet": "ldm"}), ("slip", {"clip": "clip", "cache": "cache", "unet": "ldm"})):
        (table / row).mkdir()
        for name, stage in stages.items():
            (table / row / name).symlink_to(runs / stage)
    assert run_script("prior", arguments_of("prior", runs, own / "prior", "seed=1")) == 0  # all else is the base's
    monkeypatch.setattr(sys, "argv", [*command, "--rows=base,slip"])
    ablations.main()
    shared, embeddings = (load_file(folder / "embeddings.safetensors")["image_embeds"] for folder in (table, own))
    assert shared.shape == embeddings.shape and not shared.equal(embeddings)
    base, slip = json.loads((table / "ablations.json").read_text())
    assert slip["frechet_distance"] != base["frechet_distance"]
    told = slip["image_embeddings"]
    assert 0 <= told["class_accuracy"] <= 1 and max(told.values()) <= 1 and "image_embeddings" not in base
