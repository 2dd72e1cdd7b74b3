"""Captioned images from every source: what a sample is, what is random about it, and what is refused."""

import dataclasses
import json
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.config import DataConfig
from ldm.data.batches import open_data
from ldm.data.captions import as_is, open_images
from ldm.data.check import findings
from ldm.data.columns import fill_template, make_captions
from ldm.data.decode import open_picture
from ldm.errors import RunError, UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of one colour each, left half white."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        image = Image.new("RGB", (16, 16), colour)
        image.paste((255, 255, 255), (0, 0, 8, 16))
        image.save(folder / f"{name}.png")
    return folder


def samples(config: DataConfig, epochs: int = 1, seed: int = 0) -> list[dict]:
    data = open_images(config, seed)
    return [data.__getitems__([(epoch, index) for index in range(len(data))]) for epoch in range(epochs)]


def check_colours(batch: dict) -> None:
    """Each image, (3, S, S) in [-1, 1], has the colour of its caption on its right."""
    assert batch["images"].dtype == torch.float32
    for image, caption in zip(batch["images"], batch["captions"], strict=True):
        (name,) = [name for name in COLOURS if name in caption]
        assert (image[:, 4, 12] * 127.5 + 127.5).tolist() == list(COLOURS[name])
        assert image[:, 4, 2].tolist() == [1.0, 1.0, 1.0]


def test_folder_with_a_text_file_beside_each_image(pictures):
    for name in COLOURS:
        (pictures / f"{name}.txt").write_text(f"a {name} square\n")
    (batch,) = samples(DataConfig(source=str(pictures), image_size=16))
    assert sorted(batch["captions"]) == ["a blue square", "a green square", "a red square"]
    check_colours(batch)


def test_folder_with_metadata(pictures):
    rows = [{"file_name": f"{name}.png", "words": f"all {name}"} for name in COLOURS]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (batch,) = samples(DataConfig(source=str(pictures), image_size=16, caption_column="words"))
    check_colours(batch)


@pytest.fixture
def parquet(pictures):
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=list(COLOURS)),
            "number": datasets.Value("int64"),
        }
    )
    rows = {
        "picture": [str(pictures / f"{name}.png") for name in COLOURS],
        "label": [0, 1, 2],
        "number": [0, 1, 2],
    }
    path = pictures / "pictures.parquet"
    datasets.Dataset.from_dict(rows, features).to_parquet(path)
    return str(path)


def test_parquet_with_templates_over_class_labels(parquet):
    config = DataConfig(source=parquet, image_size=16, caption_templates=["a {label} square", "{label}"])
    data = open_images(config, 0)
    assert data.captions(0) == ["a red square", "red"]
    epochs = samples(config, epochs=20)
    assert {caption for batch in epochs for caption in batch["captions"]} == {
        text for name in COLOURS for text in (f"a {name} square", name)
    }
    for batch in epochs:
        check_colours(batch)


def test_names_for_integer_labels(parquet):
    config = DataConfig(
        source=parquet,
        image_column="picture",
        image_size=16,
        caption_templates=["a {number} square"],
        label_names=["red", "green", "blue"],
    )
    (batch,) = samples(config)
    check_colours(batch)


def test_a_row_without_a_caption_has_the_empty_one(tmp_path):
    """Not the word None."""
    table = {"image": [Image.new("RGB", (8, 8))] * 2, "text": ["a cat", None]}
    columns = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=columns).to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(source=str(tmp_path / "rows.parquet"), image_size=8, caption_column="text")
    data = open_images(config, seed=0)
    assert [data.captions(index) for index in (0, 1)] == [["a cat"], [""]]
    streamed = open_data(dataclasses.replace(config, streaming=True), seed=0)
    assert [captions for _, _, captions in streamed.in_order(0)] == [["a cat"], [""]]
    filled = dataclasses.replace(config, caption_column=None, caption_templates=["{text}"])
    assert open_images(filled, seed=0).captions(1) == [""]
    assert "1 images have an empty caption, which stands for none" in findings(config.source, "train")


def test_a_column_of_lists_holds_several_captions(tmp_path):
    rows = [["a cat", "one cat"], ["a dog"], [], None]
    kinds = {"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))}
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 4, "texts": rows},
                                       features=datasets.Features(kinds))  # fmt: skip
    table.to_parquet(tmp_path / "rows.parquet")
    config = DataConfig(source=str(tmp_path / "rows.parquet"), image_size=8, caption_column="texts")
    data, wanted = open_images(config, seed=0), [["a cat", "one cat"], ["a dog"], [""], [""]]
    assert [data.captions(index) for index in range(4)] == wanted
    assert {data.__getitems__([(epoch, 0)])["captions"][0] for epoch in range(20)} == {"a cat", "one cat"}
    streamed = open_data(dataclasses.replace(config, streaming=True), seed=0)
    assert [captions for _, _, captions in streamed.in_order(0)] == wanted
    filled = dataclasses.replace(config, caption_column=None, caption_templates=["{texts}!"])
    assert open_images(filled, seed=0).captions(0) == ["a cat!"]
    assert "  caption_column: texts" in findings(config.source, "train")


def test_a_column_of_class_labels_is_captions_too(parquet):
    data = open_images(DataConfig(source=parquet, image_column="picture", caption_column="label"), seed=0)
    assert data.captions(1) == ["green"]


def test_what_a_worker_decoded_is_decoded_for_all(pictures):
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "red.png", "text": "red"}))
    data = open_images(DataConfig(source=str(pictures), image_size=16, caption_column="text"), seed=0)
    (batch,) = DataLoader(data, batch_sampler=[[(0, 0)]], num_workers=1, collate_fn=as_is)
    (pictures / "red.png").unlink()
    assert torch.equal(data.__getitems__([(1, 0)])["images"], batch["images"])


def test_a_text_file_that_is_no_text_is_named(pictures):
    (pictures / "bad.png").write_bytes(next(pictures.rglob("*.png")).read_bytes())
    (pictures / "bad.txt").write_bytes("café".encode("latin-1"))
    data = open_images(DataConfig(source=str(pictures), image_size=8), seed=0)
    with pytest.raises(UserError, match=r"bad\.txt cannot be read: it is no text in UTF-8"):
        [data.captions(index) for index in range(len(data))]


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        ("a photo of a {label}", {"label": "cat"}, "a photo of a cat"),
        ("a photo of a {label}", {"label": "airplane"}, "a photo of an airplane"),
        ("A {label}", {"label": "ibis"}, "An ibis"),
        ("a blurry {label}", {"label": "airplane"}, "a blurry airplane"),
        ("{label}, a {colour} one", {"label": "owl", "colour": "orange"}, "owl, an orange one"),
    ],
)
def test_articles_agree(template, row, text):
    assert fill_template(template, row) == text


def test_a_template_that_would_repeat_itself_gives_way_to_the_first():
    config = DataConfig(caption_templates=["a {name}", "a {name}, a kind of {concept}", "the {concept}"])
    assert make_captions(config, {"name": ["tabby cat"], "concept": ["cat"]}) == [
        "a tabby cat", "a tabby cat, a kind of cat", "the cat"
    ]  # fmt: skip
    assert make_captions(config, {"name": ["Camel"], "concept": ["camel"]}) == ["a Camel", "a Camel", "the camel"]


def test_what_is_random_depends_on_seed_epoch_and_index_alone(pictures):
    for name in COLOURS:
        (pictures / f"{name}.txt").write_text(name)
    config = DataConfig(source=str(pictures), image_size=16, horizontal_flip=True)
    data = open_images(config, 0)
    epochs = [data.__getitems__([(epoch, 0)])["images"][0] for epoch in range(32)]
    mirrored = [bool(image[1, 4, 2] < 0 or image[2, 4, 2] < 0) for image in epochs]
    assert 6 <= sum(mirrored) <= 26
    again = open_images(config, 0)
    for epoch in reversed(range(32)):  # in another order, beside another sample
        assert torch.equal(again.__getitems__([(epoch, 1), (epoch, 0)])["images"][1], epochs[epoch])
    other = open_images(config, 1)
    assert [bool((other.__getitems__([(e, 0)])["images"][0] != epochs[e]).any()) for e in range(32)].count(True) > 4


def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("L", (10, 20), 51).save(tmp_path / "grey.png")
    Image.new("CMYK", (10, 10), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    turned = Image.new("RGB", (16, 16), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 16, 8))  # white above, by EXIF to be turned by 180°
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((9, 9), 51 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.new("P", (9, 9), 1).save(tmp_path / "palette.png")
    frames = [Image.new("RGB", (9, 9), colour) for colour in ((0, 0, 255), (255, 0, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for path in list(tmp_path.iterdir()):
        path.with_suffix(".txt").write_text(path.stem)
    (batch,) = samples(DataConfig(source=str(tmp_path), image_size=8))
    images = dict(zip(batch["captions"], batch["images"], strict=True))
    assert all(image.shape == (3, 8, 8) for image in images.values())
    assert torch.all(images["clear"] == 1)  # what is transparent becomes white
    assert torch.allclose(images["grey"], torch.full((3, 8, 8), 51 / 127.5 - 1))
    assert torch.allclose(images["deep"], images["grey"])
    assert images["moving"][2].mean() > 0.9 and images["moving"][:2].max() < -0.9  # the first frame
    assert images["print"][0].mean() > 0.8 and images["print"][1:].mean() < -0.8
    assert images["turned"][:, 0].mean() < -0.9 and images["turned"][:, -1].mean() > 0.9


def test_shapes_train_and_test_share_no_caption():
    train, test = (open_images(DataConfig(split=split, max_images=300), 0) for split in ("train", "test"))
    seen, unseen = ({data.captions(index)[0] for index in range(300)} for data in (train, test))
    assert not seen & unseen
    assert np.array_equal(train.pixels(7), open_images(DataConfig(max_images=300), 5).pixels(7))


@pytest.fixture
def damaged(pictures):
    """Three pictures, of which the second is cut off after 40 bytes."""
    for name in COLOURS:
        (pictures / f"{name}.txt").write_text(name)
    (pictures / "green.png").write_bytes((pictures / "green.png").read_bytes()[:40])
    return DataConfig(source=str(pictures), image_size=16, max_bad_fraction=0.4)


def test_an_image_that_cannot_be_read_is_named_once_and_passed_over(damaged, capsys):
    data = open_images(damaged, 0)
    with pytest.raises(RunError, match=r"image 1 of .*pictures"):
        data.pixels(1)
    for _ in range(2):
        batch = data.__getitems__([(0, 0), (0, 1), (0, 2)])
        assert batch["indices"].tolist() == [0, 2, 2]
        assert batch["captions"] == [data.captions(0)[0], data.captions(2)[0], data.captions(2)[0]]
        assert torch.equal(batch["images"][1], batch["images"][2])
    assert capsys.readouterr().err.count("warning: image 1 of") == 1


def test_too_many_of_them_stop_the_run(damaged):
    data = open_images(dataclasses.replace(damaged, max_bad_fraction=0.1), 0)
    with pytest.raises(
        RunError, match=r"1 of the 3 images of .* cannot be decoded, more than data.max_bad_fraction 0.1"
    ):
        data.__getitems__([(0, 1)])
    for name in COLOURS:
        (Path(damaged.source) / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match="3 of the 3 images"):
        open_images(dataclasses.replace(damaged, max_bad_fraction=1.0), 0).__getitems__([(0, 0)])


def test_those_of_all_data_workers_count_together(damaged, pictures):
    """Two of four are too many; each of two workers meets one, and a good one in its place."""
    (pictures / "yellow.png").write_bytes(b"no picture")
    (pictures / "yellow.txt").write_text("yellow")
    data = open_images(damaged, 0)
    with pytest.raises(RunError, match="2 of the 4 images"):
        list(DataLoader(data, batch_sampler=[[(0, 1)], [(0, 3)]], num_workers=2, collate_fn=as_is))
    assert data.unreadable == 2


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "bomb.txt").write_text("words")
    with pytest.raises(RunError, match=r"image 0 of .* cannot be decoded"):
        open_images(DataConfig(source=str(tmp_path)), 0).pixels(0)
    with pytest.raises(ValueError, match="12000 × 10000 pixels are more than 89,478,485"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of the same
        Image.new("1", (12_000, 10_000)).save(tmp_path / "large.png")
        open_picture(str(tmp_path / "large.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_column": "image"}, "image_column 'image': no such column.*has the columns picture, label, number"),
        ({"caption_templates": ["a {"]}, "caption_templates 'a {': .*; name a column as {label}"),
        ({"caption_column": "text"}, "caption_column 'text'.*it has picture, label, number"),
        ({"caption_templates": ["a {lable}"]}, "name 'lable'.*it has picture, label, number"),
        ({"caption_templates": []}, "set caption_column or caption_templates.*label, number"),
        ({"label_names": ["red"], "caption_templates": ["{number}"]}, "label_names has 1 names.*holds 1"),
        ({"source": "absent.parquet"}, "absent.parquet: no such file"),
        ({"source": "./absent"}, "absent: no such file or folder"),
    ],
)
def test_what_cannot_be_used_is_named(parquet, change, said):
    settings = {"source": parquet, "image_column": "picture", "image_size": 16, "caption_templates": ["{label}"]}
    with pytest.raises(UserError, match=said):
        open_images(DataConfig(**settings | change), 0)


def test_the_image_column_is_named_where_it_is_not_the_only_one(tmp_path, parquet):
    table = datasets.load_dataset("parquet", data_files=parquet, split="train")
    pictures = table.select_columns("picture")
    datasets.concatenate_datasets([table, pictures.rename_column("picture", "second")], axis=1).to_parquet(
        tmp_path / "two.parquet"
    )
    table.remove_columns("picture").to_parquet(tmp_path / "none.parquet")
    for name, said in (("two", "2 columns hold images; .*picture, label, number, second"), ("none", "no column holds")):
        with pytest.raises(UserError, match=f"data.image_column must be set: {said}"):
            open_images(DataConfig(source=str(tmp_path / f"{name}.parquet"), caption_templates=["{label}"]), 0)


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no images there"):
        open_images(DataConfig(source=str(tmp_path)), 0)
    (tmp_path / "note.txt").write_text("words")
    with pytest.raises(UserError, match="no images there"):
        open_images(DataConfig(source=str(tmp_path)), 0)
