"""Splits and captions of data sets that say neither."""

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from ldm.config import DataConfig
from ldm.data.captions import open_images
from ldm.data.splits import captioned, choose_split, splits_of
from ldm.errors import UserError


def picture(grey: int = 100) -> Picture.Image:
    return Picture.new("RGB", (8, 8), (grey,) * 3)


def write_parquet(path, names: list[str] | None = None, **columns: list) -> None:
    kinds = {
        name: Value("string") if isinstance(values[0], str) else Value("int64") for name, values in columns.items()
    }
    if names is not None:
        kinds["label"] = ClassLabel(names=names)
    rows = {"image": [picture(n) for n in range(len(next(iter(columns.values()))))], **columns}
    Dataset.from_dict(rows, features=Features({"image": Image(), **kinds})).to_parquet(path)


def test_parquet_files_are_splits_by_their_names(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / f"{name}.parquet", ["cat", "dog"], label=[0, 1, 0])
    there = splits_of(str(tmp_path))
    assert list(there) == ["test", "train"] and choose_split("it", there, None) == "test"
    config = captioned(there["train"], None, None)
    assert config.caption_templates == ["a photo of a {label}"]
    data = open_images(config, seed=0)
    assert [data.captions(index)[0] for index in range(len(data))] == [
        f"a photo of a {n}" for n in ("cat", "dog", "cat") * 2
    ]


def test_one_file_is_the_split_that_its_name_says(tmp_path):
    write_parquet(tmp_path / "validation.parquet", text=["one", "two"])
    write_parquet(tmp_path / "mine.parquet", text=["one", "two"])
    assert list(splits_of(str(tmp_path / "validation.parquet"))) == ["validation"]
    assert list(splits_of(str(tmp_path / "mine.parquet"))) == ["all"]


def test_folders_of_images_and_of_text_files(tmp_path):
    for split in ("train", "validation"):
        for word in ("cat", "dog"):
            (tmp_path / "labels" / split / word).mkdir(parents=True)
            picture().save(tmp_path / "labels" / split / word / "0.png")
        (tmp_path / "texts" / split).mkdir(parents=True)
        picture().save(tmp_path / "texts" / split / "0.png")
        (tmp_path / "texts" / split / "0.txt").write_text("a cat")
    for kind, caption in (("labels", "a photo of a cat"), ("texts", "a cat")):
        there = splits_of(str(tmp_path / kind))
        assert sorted(there) == ["train", "validation"]
        config = captioned(there[choose_split(kind, there, None)], None, None)
        assert open_images(config, seed=0).captions(0) == [caption]


def test_the_data_that_are_drawn_have_two():
    assert list(splits_of("shapes")) == list(splits_of("digits")) == ["train", "test"]


def test_a_split_is_asked_for_or_speaks_for_itself():
    assert choose_split("it", {"train": 0, "validation": 0}, None) == "validation"
    assert choose_split("it", {"train": 0, "test": 0, "validation": 0}, None) == "test"
    assert choose_split("it", {"train": 0}, None) == "train"
    assert choose_split("it", {"train": 0, "test": 0}, "train") == "train"
    with pytest.raises(UserError, match="--split 'other': it has train, test"):
        choose_split("it", {"train": 0, "test": 0}, "other")
    with pytest.raises(UserError, match="has the splits left, right; name one with --split"):
        choose_split("it", {"left": 0, "right": 0}, None)


def test_captions_that_are_named_are_taken(tmp_path):
    write_parquet(tmp_path / "a.parquet", name=["tabby cat"], kind=["cat"])
    config = DataConfig(source=str(tmp_path / "a.parquet"))
    assert captioned(config, None, None).caption_column == "name"  # the longer texts
    assert captioned(config, "kind", None).caption_column == "kind"
    assert captioned(config, None, "a {kind}").caption_templates == ["a {kind}"]


def test_whole_numbers_are_labels_where_they_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", width=[8, 8], fine_label=[1, 0], source=["web", "web"])
    config = DataConfig(source=str(tmp_path / "a.parquet"), label_names=["cat", "owl"])
    config = captioned(config, None, None)
    assert config.caption_templates == ["a photo of a {fine_label}"]
    data = open_images(config, seed=0)
    assert [data.captions(index) for index in range(2)] == [["a photo of an owl"], ["a photo of a cat"]]


def test_what_captions_have_no_use_for_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["cat", "owl"], label=[1, 0], text=["one", "two"])
    config = DataConfig(source=str(tmp_path / "a.parquet"), label_names=["dog", "hen"])
    for template in (None, "a {label}", "a {text}"):
        with pytest.raises(UserError, match=r"--label-names: (label|text) of .* has words of its own; leave it out"):
            captioned(config, None, template)
    for option, column, template, names in (("--caption-column", "label", None, []),
                                            ("--caption-template", None, "a {label}", []),
                                            ("--label-names", None, None, ["cat"])):  # fmt: skip
        with pytest.raises(UserError, match=f"{option}: shapes has captions of its own"):
            captioned(DataConfig(source="shapes", label_names=names), column, template)


@pytest.mark.parametrize("source", ["nowhere/at/all", "/nowhere"])
def test_no_such_source(source):
    with pytest.raises(UserError, match="no such folder or parquet file, nor the name of a Hub repository"):
        splits_of(source)


def test_data_without_captions_are_refused_with_what_is_there(tmp_path):
    write_parquet(tmp_path / "a.parquet", number=[1, 2])
    with pytest.raises(UserError, match="holds no captions that speak for themselves; it has image, number: name one"):
        captioned(DataConfig(source=str(tmp_path / "a.parquet")), None, None)
