"""Folders with a .txt beside each image: their splits, their column, and what is said of the rest."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.data.batches import open_data
from ldm.data.captions import open_images
from ldm.data.splits import splits_of
from ldm.data.text_files import is_folder_of_text_files
from ldm.errors import RunError, UserError


def write(path: Path, caption: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def captions(config: DataConfig) -> list[list[str]]:
    data = open_images(config, seed=0)
    return [data.captions(index) for index in range(len(data))]


def test_sub_folders_named_as_splits_are_splits(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "any" / "0.png", split)
    config = DataConfig(source=str(tmp_path))
    assert captions(config) == [["train"]] and captions(dataclasses.replace(config, split="test")) == [["test"]]
    with pytest.raises(UserError, match=r"data.split dev: .* has test, train, by the names of its sub-folders"):
        open_images(dataclasses.replace(config, split="dev"), seed=0)


@pytest.mark.parametrize("other", ["cat/0.png", "0.png"])
def test_a_folder_of_trains_is_none(tmp_path, other):
    write(tmp_path / "train" / "0.png", "a steam train")
    write(tmp_path / other, "a cat")
    assert sorted(captions(DataConfig(source=str(tmp_path)))) == [["a cat"], ["a steam train"]]
    assert list(splits_of(str(tmp_path))) == ["all"]
    with pytest.raises(UserError, match=r"data.split test: .* has train"):
        open_images(DataConfig(source=str(tmp_path), split="test"), seed=0)


def test_a_split_of_files_that_have_none_is_refused(tmp_path):
    """Else what is told of other images would be told of those that were trained on."""
    import datasets

    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["one"]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    config = DataConfig(source=str(tmp_path / "a.parquet"), caption_column="text")
    assert captions(config) == [["one"]]
    with pytest.raises(UserError, match=r"data.split test: .*a\.parquet has no splits; take a folder"):
        open_images(dataclasses.replace(config, split="test"), seed=0)


def test_the_text_is_a_column(tmp_path, capsys):
    write(tmp_path / "0.png", "tabby cat")
    config = DataConfig(source=str(tmp_path), caption_column="text")
    assert captions(config) == [["tabby cat"]]
    templates = dataclasses.replace(config, caption_column=None, caption_templates=["a {text}", "a photo of a {text}"])
    assert captions(templates) == [["a tabby cat", "a photo of a tabby cat"]]
    both = dataclasses.replace(templates, caption_column="text")
    assert open_data(both, seed=0).captions(0) == ["tabby cat"]
    assert "warning: data.caption_templates are not used" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data.caption_column 'caption': .* has no such column; it has image, text"):
        open_images(dataclasses.replace(config, caption_column="caption"), seed=0)


def test_an_image_is_named_by_its_file_and_one_without_a_caption_is_told_of(tmp_path, capsys):
    write(tmp_path / "good.png", "good")
    write(tmp_path / "new.PNG", "new")
    write(tmp_path / "deep" / "bad.png", "bad")
    for number in range(3):
        write(tmp_path / f"none{number}.png", None)
    (tmp_path / "deep" / "bad.png").write_bytes(b"no picture")
    data = open_images(DataConfig(source=str(tmp_path), image_size=8), seed=0)
    assert len(data) == 3 and data.pixels(2).shape == (3, 8, 8)
    assert (
        f"warning: {tmp_path / 'none0.png'} has no .txt beside it: left out; nor have 2 more" in capsys.readouterr().err
    )
    with pytest.raises(RunError, match=r"image 0 of .* \(deep/bad\.png\) cannot be decoded"):
        data.pixels(0)


def test_a_licence_is_no_caption(tmp_path):
    write(tmp_path / "0.png", None)
    (tmp_path / "LICENSE.txt").write_text("free")
    assert not is_folder_of_text_files(str(tmp_path))
