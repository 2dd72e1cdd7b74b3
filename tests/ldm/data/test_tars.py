"""Tar shards on disk: what is read from them in any order, and what is refused."""

import gzip
import re

import pytest
import torch
from PIL import Image

from ldm.config import DataConfig
from ldm.data.captions import open_images
from ldm.data.tars import columns_of, expand_ranges, samples, shards_of
from ldm.errors import RunError, UserError
from pipelines.cli import main as ldm_command

RED, GREEN = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 255, 0))


def all_of(**settings) -> dict:
    data = open_images(DataConfig(image_size=8, **settings), 0)
    return data.__getitems__([(0, index) for index in range(len(data))])


def test_ranges():
    assert expand_ranges("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand_ranges("{0..1}/{1..2}") == ["0/1", "0/2", "1/1", "1/2"]
    assert expand_ranges("plain.tar") == ["plain.tar"]
    with pytest.raises(UserError, match=r"holds nothing"):
        expand_ranges("a-{3..1}.tar")


@pytest.mark.parametrize("source", ["*.tar", "shard-{000..002}.tar", ""])
def test_a_glob_a_range_and_a_folder_name_the_same_shards(tmp_path, write_shards, source):
    paths = write_shards(tmp_path, [3, 1, 4])
    (tmp_path / "notes.txt").write_text("no caption")
    assert shards_of(str(tmp_path / source)) == [str(path) for path in paths]
    batch = all_of(source=str(tmp_path / source), caption_column="txt")
    numbers = [0, 1, 2, 10, 20, 21, 22, 23]
    assert batch["captions"] == [f"grey {number}" for number in numbers]
    right = (batch["images"][:, :, :, 6] * 127.5 + 127.5).round()
    assert torch.equal(right, torch.tensor(numbers).float()[:, None, None].expand(8, 3, 8))
    assert (batch["images"][:, :, :, 2] == -1).all()


def test_samples_differ_in_what_they_hold(tmp_path, write_tar):
    """jpg and png, folders, JSON of several shapes, hidden files and members that no one asks for."""
    members = {
        "cats/1.jpg": RED,
        "cats/1.json": {"caption": "first", "author": {"name": "A"}, "width": 8},
        "cats/.hidden.txt": "hidden",
        "README": "no sample",
        "2.PNG": GREEN,
        "2.json": {"caption": "second", "author": {"name": "B", "age": 3}, "width": "eight", "list": [1]},
        "2.pth": b"\x80\x04not to be unpickled",
        "2.mask.png": RED,
    }
    source = str(write_tar(tmp_path / "a.tar", members))
    batch = all_of(source=source, caption_column="json.caption")
    assert batch["captions"] == ["first", "second"]
    assert batch["images"][0, 0].min() > 0.9 and batch["images"][1, 1].min() == 1
    batch = all_of(source=source, caption_templates=["{json.caption} by {json.author.name}, {json.width}"])
    assert batch["captions"] == ["first by A, 8", "second by B, eight"]
    lists = {"1.jpg": RED, "1.json": {"captions": ["one", "two"]}, "2.jpg": RED, "2.json": {"captions": ["three"]}}
    config = DataConfig(source=str(write_tar(tmp_path / "b.tar", lists)), caption_column="json.captions")
    assert [open_images(config, 0).captions(index) for index in range(2)] == [["one", "two"], ["three"]]
    assert "json.captions" in columns_of(config.source)


def test_a_column_may_be_named_and_labels_have_names(tmp_path, write_tar):
    members = {"1.jpg": RED, "1.mask.png": GREEN, "1.cls": "1\n", "2.jpg": RED, "2.mask.png": GREEN, "2.cls": "0"}
    source = str(write_tar(tmp_path / "a.tar", members))
    names = {"caption_templates": ["a {cls}"], "label_names": ["cat", "owl"]}
    batch = all_of(source=source, image_column="mask.png", **names)
    assert batch["captions"] == ["an owl", "a cat"] and batch["images"][:, 1].min() == 1
    with pytest.raises(UserError, match=r"label_names has 1 names.*holds 1"):
        all_of(source=source, caption_templates=["a {cls}"], label_names=["cat"])


def test_samples_without_picture_or_caption_are_told_and_left_out(tmp_path, write_tar, capsys):
    members = {f"{n}.jpg": RED for n in range(3)} | {"3.txt": "alone", "4.jpg": RED, "4.png": RED, "4.txt": "two"}
    members = dict(sorted((members | {"0.txt": "zero", "1.txt": "one", "2.json": {}}).items()))
    source = str(write_tar(tmp_path / "a.tar", members))
    batch = all_of(source=source, caption_column="txt", max_bad_fraction=0.6)
    assert batch["captions"] == ["zero", "one"]
    warning = f"warning: sample 2 of {source}: it has no .txt; skipped; so are 2 more"
    assert capsys.readouterr().err.splitlines() == [warning]
    with pytest.raises(UserError, match=r"3 of 5 samples lack a picture or a caption.*the first is sample 2"):
        all_of(source=source, caption_column="txt")


def test_samples_left_out_count_with_pictures_that_cannot_be_decoded(tmp_path, write_tar):
    members = {f"{n}.jpg": b"damaged" if n == 0 else RED for n in range(5)} | {f"{n}.txt": "red" for n in range(4)}
    source = str(write_tar(tmp_path / "a.tar", dict(sorted(members.items()))))
    with pytest.raises(RunError, match=r"2 of the 5 images of .* cannot be decoded, or lack a picture or a caption"):
        all_of(source=source, caption_column="txt", max_bad_fraction=0.3)
    assert len(all_of(source=source, caption_column="txt", max_bad_fraction=0.4)["captions"]) == 4


def test_only_so_many(tmp_path, write_shards):
    write_shards(tmp_path, [3, 3])
    assert len(all_of(source=str(tmp_path), caption_column="txt", max_images=4)["captions"]) == 4


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent-*.tar", "no such file: .*absent-"),
        ("shard-{000..002}.tar", "no such file: .*shard-002.tar"),
        ("short.tar", "short.tar is not a whole, uncompressed tar archive"),
        ("severed.tar", "severed.tar is not a whole, uncompressed tar archive"),
        ("endless.tar", "endless.tar is not a whole, uncompressed tar archive .empty header"),
        ("damaged.tar", "damaged.tar is not a whole, uncompressed tar archive .*bad checksum at byte 3072"),
        ("text.tar", "text.tar is not a whole, uncompressed tar archive"),
        ("packed.tar", "packed.tar is not a whole, uncompressed tar archive"),
        ("nothing.tar", "nothing.tar holds no samples"),
        ("words.tar", "no column is of pictures; .*words.tar has txt"),
        ("pictures.tar", "set caption_column or caption_templates.* has the columns jpg"),
    ],
)
def test_what_is_no_set_of_shards_is_refused_in_a_line(tmp_path, write_tar, write_shards, capsys, source, words):
    good = write_shards(tmp_path, [3, 3])[0].read_bytes()
    (tmp_path / "short.tar").write_bytes(good[:3300])  # within a header
    (tmp_path / "severed.tar").write_bytes(good[:2100])  # within a picture
    (tmp_path / "endless.tar").write_bytes(good[: good.rstrip(b"\0").__len__() // 512 * 512 + 512])
    (tmp_path / "damaged.tar").write_bytes(good[:3072] + bytes([good[3072] ^ 1]) + good[3073:])
    (tmp_path / "text.tar").write_text("no archive " * 100)
    (tmp_path / "packed.tar").write_bytes(gzip.compress(good))
    write_tar(tmp_path / "nothing.tar", {})
    write_tar(tmp_path / "words.tar", {"1.txt": "a"})
    write_tar(tmp_path / "pictures.tar", {"1.jpg": RED})
    with pytest.raises(SystemExit) as ended:
        ldm_command(["data-check", str(tmp_path / source)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


def test_data_check(tmp_path, write_tar, capsys):
    members = {"1.jpg": RED, "1.txt": "red " * 90, "1.json": {"caption": "x", "width": 8}}
    members |= {"2.png": b"damaged", "2.txt": "green", "2.json": {}, "2.npy": b""}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(SystemExit) as ended:
        ldm_command(["data-check", str(tmp_path / "*.tar")])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "1 shard, columns: jpg (image), txt (string), json (other), json.caption (string), json.width (string), "
        "png (image), npy (other)"
    )
    assert "  caption_column: txt" in lines and "1 of 2 images cannot be decoded" in lines
    assert any(line.startswith("row 0: 8 × 8 RGB, 'red red") for line in lines)
    assert lines[-1].startswith("2 different captions, at most 92 of CLIP's tokens long; 1 are longer")


def test_pickles_are_never_opened(tmp_path, write_tar):
    (sample,) = samples(str(write_tar(tmp_path / "a.tar", {"1.jpg": RED, "1.pth": b"x", "1.pyd": b"x"})), ["txt"], True)
    assert set(sample.read) == {"jpg"} and set(sample.places) == {"jpg", "pth", "pyd"}
