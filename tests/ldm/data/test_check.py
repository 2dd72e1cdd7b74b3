"""`ldm data-check`: what is said of a data set of each kind."""

import json

import datasets
import pytest
from PIL import Image

from ldm.data.check import findings
from pipelines.cli import main as ldm_command


@pytest.fixture
def folder(tmp_path):
    """Four images with metadata; one is damaged, one caption is too long."""
    captions = ["a red square", "word " * 90, "a green square", "a blue square"]
    with (tmp_path / "metadata.jsonl").open("w") as file:
        for number, caption in enumerate(captions):
            Image.new("RGB", (20, 10), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "caption": caption, "author": "nobody"}) + "\n")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:30])
    return tmp_path


def test_a_folder_with_metadata(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        ldm_command(["data-check", str(folder)])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 rows, columns: image (image), caption (string), author (string)"
    assert "  image_column: image" in lines and "  caption_column: caption" in lines
    assert "row 0: 20 × 10 RGB, 'a red square'" in lines
    assert "1 of 4 images cannot be decoded" in lines
    assert any(line.startswith("  image 3 of") for line in lines)
    assert lines[-1].startswith("4 different captions, at most 92 of CLIP's tokens long; 1 are longer")


def test_labels_become_a_template(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    rows = {"img": [str(tmp_path / "a.png")] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data.parquet")
    lines = list(findings(str(tmp_path / "data.parquet"), "train"))
    assert lines[0] == "2 rows, columns: img (image), label (label of 2)"
    assert "  caption_templates: ['a photo of a {label}']" in lines
    assert "row 1: 8 × 8 L, 'a photo of a dog'" in lines


def test_text_files_beside_images(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a black square")
    Image.new("RGB", (9, 12)).save(tmp_path / "b.PNG")
    (tmp_path / "b.txt").write_text("word " * 90)
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    lines = list(findings(str(tmp_path), "train"))
    assert lines[0] == "2 images with a .txt beside them, columns: image (image), text (string)"
    assert "row 0: 8 × 8 RGB, 'a black square'" in lines and "0 of 2 images cannot be decoded" in lines
    assert "shorter sides of 8 to 9 pixels, median 9, which data.image_size makes one" in lines
    said = capsys.readouterr().err.splitlines()
    assert f"warning: {tmp_path / 'c.png'} has no .txt beside it: left out" in said
    assert not [line for line in said if "sequence length" in line]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./absent", "absent: no such file"),
        ("", "SOURCE '' is empty"),
        ("0.png", "0.png: a file must be .parquet or .tar"),
        ("empty", "empty/metadata.jsonl is empty; write a line for each image"),
    ],
)
def test_what_is_no_data_set_is_told_in_a_line(folder, monkeypatch, capsys, source, words):
    (folder / "empty").mkdir()
    (folder / "empty" / "metadata.jsonl").touch()
    Image.new("RGB", (8, 8)).save(folder / "empty" / "0.png")
    monkeypatch.chdir(folder)  # whose images no empty name stands for
    with pytest.raises(SystemExit) as ended:
        ldm_command(["data-check", source])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.out == ""
