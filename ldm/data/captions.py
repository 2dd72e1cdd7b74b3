"""Captioned images from a Hub repository, a folder, parquet files, tar shards, scikit-learn's digits, or
`ldm.data.shapes`."""

import glob
import mmap
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data import shapes, tars, text_files
from ldm.data.columns import caption_columns, make_captions, texts
from ldm.data.decode import open_picture, to_square
from ldm.data.text_files import IMAGE_SUFFIXES, is_folder_of_text_files
from ldm.errors import RunError, UserError
from ldm.training import randomness

_MEMORY_LIMIT = 2**30  # decoded images are kept in memory up to this many bytes
_SHAPES_LENGTH = 20_000


class CaptionedImages(torch.utils.data.Dataset):
    """Samples addressed as (epoch, index); what is random about one is a function of (seed, epoch, index).

    A batch is a dict: images (B, 3, S, S) float32 in [-1, 1]; captions, a list of B strings; indices (B,) int64.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        read_image: Callable[[int], Image.Image],
        read_captions: Callable[[int], list[str]],
        length: int,
        file_of: Callable[[int], str | None] = lambda index: None,
        left_out: int = 0,
    ):
        """left_out: samples that are not among the `length` because they lack a picture or a caption."""
        self.config, self.seed, self.length, self.left_out = config, seed, length, left_out
        self._read_image, self._read_captions, self._file_of = read_image, read_captions, file_of
        pixels = 3 * config.image_size**2
        self._pixels = _shared(length * pixels).reshape(length, pixels) if length * pixels <= _MEMORY_LIMIT else None
        self._is_read, self._is_unreadable = _shared(length), _shared(length)

    buckets = None
    """All images are of one shape."""

    def __len__(self) -> int:
        return self.length

    @property
    def unreadable(self) -> int:
        """How many of the samples that were asked for so far, by all data workers, cannot be decoded."""
        return int(self._is_unreadable.sum())

    def captions(self, index: int) -> list[str]:
        """Every caption of sample `index`; the first is the canonical one."""
        return self._read_captions(index)

    def some_captions(self, count: int) -> Iterator[str]:
        """Captions of about `count` samples, evenly spread."""
        for index in range(0, len(self), max(1, len(self) // count)):
            yield from self.captions(index)

    def excerpt(self, count: int) -> "CaptionedImages":
        """A data set of at least `count` samples, where there are so many: this one. Streams have another answer."""
        return self

    def name(self, index: int) -> str:
        """What messages call sample `index`: its number, and its file where it has one of its own."""
        file = self._file_of(index)
        return f"image {index} of {self.config.source}" + (f" ({file})" if file else "")

    def open(self, index: int) -> Image.Image:
        """The picture of sample `index` as it is stored; only its header is read yet."""
        return self._read_image(index)

    def pixels(self, index: int) -> np.ndarray:
        """Sample `index` as uint8 (3, S, S), not flipped.

        Raises:
            RunError: the image cannot be decoded; the line names it.
        """
        size = self.config.image_size
        if self._pixels is not None and self._is_read[index]:
            return self._pixels[index].reshape(3, size, size)
        try:
            image = to_square(self.open(index), size)
        except Exception as error:  # damaged files make decoders raise anything
            raise RunError(f"{self.name(index)} cannot be decoded: {error}") from None
        values = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        if self._pixels is not None:
            self._pixels[index] = values.reshape(-1)
            self._is_read[index] = 1  # last: another process may look
        return values

    def decoded(self, index: int) -> np.ndarray | None:
        """`pixels` of sample `index`, or None where it cannot be decoded, which is told on standard error once.

        Raises:
            RunError: more than data.max_bad_fraction of all samples cannot, or none can.
        """
        if not self._is_unreadable[index]:
            try:
                return self.pixels(index)
            except RunError as error:
                self._is_unreadable[index] = 1
                tqdm.write(f"warning: {error}; skipped", file=sys.stderr)
        self.check_readable(self.unreadable)
        return None

    def check_readable(self, bad: int) -> None:
        """Raises RunError where `bad` images that cannot be decoded, and what was left out, are more than
        data.max_bad_fraction of all samples, or all."""
        allowed, unusable, count = self.config.max_bad_fraction, bad + self.left_out, len(self) + self.left_out
        if unusable > allowed * count or unusable == count:
            fault = "cannot be decoded, or lack a picture or a caption" if self.left_out else "cannot be decoded"
            raise RunError(
                f"{unusable} of the {count} images of {self.config.source} {fault}, more than "
                f"data.max_bad_fraction {allowed:g} allows; mend them, or raise it"
            )

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The samples at `places`; the next that can be decoded stands in for one that cannot."""
        images, captions, indices = [], [], []
        for epoch, index in places:
            while (pixels := self.decoded(index)) is None:
                index = (index + 1) % len(self)
            indices.append(index)
            draw = randomness.key(self.seed, "augmentation", epoch, index)
            images.append(pixels[:, :, ::-1] if self.config.horizontal_flip and draw % 2 else pixels)
            choices = self.captions(index)
            captions.append(choices[draw // 2 % len(choices)])
        return {
            "images": to_float(np.stack(images)),
            "captions": captions,
            "indices": torch.tensor(indices),
        }


def _shared(count: int) -> np.ndarray:
    """Zeros (count,) uint8 in memory that data workers have in common, so that they decode an image, or fail to, once,
    not each."""
    return np.frombuffer(mmap.mmap(-1, max(count, 1)), np.uint8, count)


def as_is(batch: dict[str, Any]) -> dict[str, Any]:
    """collate_fn for a DataLoader: `__getitems__` has made the batch already."""
    return batch


def to_float(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (…) to float32 (…) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def open_images(config: DataConfig, seed: int) -> CaptionedImages:
    """Opens `config.source`.

    Raises:
        UserError: no such source, a column that is not there (those that are get listed), or no caption given.
    """
    if config.streaming:
        raise UserError(f"data.streaming: {config.source} has to be read in any order here; set it to false")
    if config.source == "shapes":
        return _open_shapes(config, seed)
    if config.source == "digits":
        return _open_digits(config, seed)
    if tars.is_tars(config.source):
        check_no_split(config)
        read_image, captions, left_out = tars.index(config)
        captions_of = captions.__getitem__
        return CaptionedImages(config, seed, read_image, captions_of, len(captions), left_out=left_out)
    if is_folder_of_text_files(config.source):
        return _open_text_files(config, seed, Path(config.source))
    table = load_table(config)
    image_column = image_column_of(config, table)
    caption_of = _caption_reader(config, table, image_column)
    table = table.cast_column(image_column, datasets.Image(decode=False))
    if config.max_images is not None:
        table = table.select(range(min(config.max_images, len(table))))
    if len(table) == 0:
        raise UserError(f"data.source {config.source}: no images there")
    images = table.select_columns([image_column])

    def read_image(index: int) -> Image.Image:
        stored = images[index][image_column]
        return open_picture(stored["bytes"] if stored["bytes"] is not None else stored["path"])

    return CaptionedImages(config, seed, read_image, caption_of, len(table), lambda i: images[i][image_column]["path"])


def check_no_split(config: DataConfig) -> None:
    """Raises UserError where a split is asked of files that are all of one."""
    if config.split != "train":
        raise UserError(
            f"data.split {config.split}: {config.source} has no splits; take a folder or repository that has, or name "
            "the files of that split as data.source"
        )


def load_table(config: DataConfig, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """The table of a parquet file, a folder with metadata or a Hub repository; `streaming`: as an iterable one, of
    parquet files and Hub repositories alone. Raises UserError where there is none."""
    source = config.source
    try:
        if source.endswith(".parquet"):
            if not glob.glob(source, recursive=True):
                raise UserError(f"data.source {source}: no such file")
            check_no_split(config)
            return datasets.load_dataset("parquet", data_files=source, split="train", streaming=streaming)
        if Path(source).is_dir():
            if parquet := sorted(str(path) for path in Path(source).glob("*.parquet")):
                raise UserError(f"data.source {source}: name one of its parquet files: {', '.join(parquet)}")
            if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in Path(source).rglob("*")):
                raise UserError(f"data.source {source}: no images there")
            if empty := [
                path for path in Path(source).rglob("metadata.*") if path.is_file() and not path.stat().st_size
            ]:
                raise UserError(f"data.source {source}: {empty[0]} is empty; write a line for each image, or remove it")
        if streaming and (Path(source).is_dir() or source in ("shapes", "digits")):
            raise UserError(
                f"data.streaming: {source} is no tar shards, parquet files or Hub repository; set it to false"
            )
        if Path(source).is_dir():
            return datasets.load_dataset("imagefolder", data_dir=source, split=config.split)
        if Path(source).is_file():
            raise UserError(f"data.source {source}: a file must be .parquet or .tar; name one, or a folder of images")
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
            raise UserError(f"data.source {source}: no such file or folder, nor the name of a Hub repository")
        return datasets.load_dataset(source, split=config.split, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # every fault of the data set's own files or of the network, in one line
        raise UserError(f"data.source {source}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def image_column_of(config: DataConfig, table: datasets.Dataset | datasets.IterableDataset) -> str:
    """The column named, or the only one of images: of that type, or of {bytes, path} as parquet files have it."""
    there = f"{config.source} has the columns {', '.join(table.column_names)}"
    if config.image_column is not None:
        if config.image_column not in table.column_names:
            raise UserError(f"data.image_column {config.image_column!r}: no such column; {there}")
        return config.image_column
    of_images = [
        name
        for name, kind in table.features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})
    ]
    if len(of_images) != 1:
        found = f"{len(of_images)} columns hold images" if of_images else "no column holds images"
        raise UserError(f"data.image_column must be set: {found}; {there}")
    return of_images[0]


def _caption_reader(config: DataConfig, table: datasets.Dataset, image_column: str) -> Callable[[int], list[str]]:
    needed, kinds = caption_columns(config, table.column_names, image_column), table.features
    if config.caption_column is not None:  # which may be long, and is read row by row
        column = table[config.caption_column]
        return lambda index: texts(config, kinds[config.caption_column], config.caption_column, column[index])
    values = {name: [texts(config, kinds[name], name, value) for value in table[name][:]] for name in needed}
    return lambda index: make_captions(config, {name: column[index] for name, column in values.items()})


def _open_text_files(config: DataConfig, seed: int, folder: Path) -> CaptionedImages:
    """A folder with the caption of `name.png` in `name.txt`: its column `text`, which needs not be named."""
    if config.caption_column is not None or config.caption_templates:
        caption_columns(config, text_files.COLUMNS, "image")
    paths, without = text_files.images_in(folder, config.split)
    if without:
        more = f"; nor have {len(without) - 1} more" if len(without) > 1 else ""
        tqdm.write(f"warning: {without[0]} has no .txt beside it: left out{more}", file=sys.stderr)

    def captions(index: int) -> list[str]:
        text = [text_files.caption_of(paths[index])]
        return make_captions(config, {"text": text}) if config.caption_templates else text

    return CaptionedImages(
        config,
        seed,
        lambda index: open_picture(str(paths[index])),
        captions,
        len(paths[: config.max_images]),
        lambda index: str(paths[index].relative_to(folder)),
    )


def _open_shapes(config: DataConfig, seed: int) -> CaptionedImages:
    if config.split not in ("train", "test"):
        raise UserError(f"data.split of shapes must be train or test, got {config.split!r}")
    scenes, number = [], 0
    while len(scenes) < (config.max_images or _SHAPES_LENGTH):
        scene = shapes.make_scene(0, number)
        number += 1
        if shapes.is_held_out(scene.caption) == (config.split == "test"):
            scenes.append(scene)
    return CaptionedImages(
        config,
        seed,
        lambda index: shapes.draw(scenes[index], config.image_size),
        lambda index: [scenes[index].caption],
        len(scenes),
    )


def _open_digits(config: DataConfig, seed: int) -> CaptionedImages:
    """scikit-learn's 1,797 handwritten digits, 8×8 in 17 grey levels; one in five is the test split."""
    if config.split not in ("train", "test"):
        raise UserError(f"data.split of digits must be train or test, got {config.split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('data.source digits: needs scikit-learn; pip install "ldm[mathematics]"') from None
    digits = load_digits()
    numbers = [n for n in range(len(digits.images)) if (n % 5 == 4) == (config.split == "test")][: config.max_images]
    levels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return CaptionedImages(
        config,
        seed,
        lambda index: Image.fromarray(levels[numbers[index]]),
        lambda index: [f"the digit {digits.target[numbers[index]]}"],
        len(numbers),
    )
