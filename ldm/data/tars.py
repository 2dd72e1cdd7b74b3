"""Webdataset tar shards: members of one name up to the first dot are a sample, the rest of the name is the column.

    shard-000.tar: cat1.jpg, cat1.txt, cat1.json, cat2.png, cat2.txt …

Fields of a .json member are columns too, written with a dot: `json.caption`. Nothing but pictures, texts and JSON is
ever read from a shard, whatever else its samples hold.
"""

import glob
import itertools
import json
import os
import re
import sys
import tarfile
import urllib.error
import urllib.request
from array import array
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data.columns import caption_columns, make_captions, texts
from ldm.data.decode import open_picture
from ldm.errors import UserError

SUFFIX = ".tar"
PICTURES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
TIMEOUT = 60  # seconds without a byte until a server is given up
PEEKED = 100  # samples of the first shard whose columns are looked at


@dataclass(frozen=True)
class TarSample:
    """One sample of a shard. `places`: where in the shard's file the data of each column begin, and their length;
    `read`: the data of the columns that were to be read."""

    key: str
    places: dict[str, tuple[int, int]]
    read: dict[str, bytes]


def is_tars(source: str) -> bool:
    """Whether `source` names tar shards: a path, a glob, a brace range or URLs, or a folder of them."""
    return _without_query(source).endswith(SUFFIX) or (Path(source).is_dir() and any(Path(source).glob(f"*{SUFFIX}")))


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def shards_of(source: str) -> list[str]:
    """Paths or URLs of the shards, in order.

    Raises:
        UserError: none there, or one of a range is absent.
    """
    if Path(source).is_dir():
        return sorted(str(path) for path in Path(source).glob(f"*{SUFFIX}"))
    shards = []
    for name in expand_ranges(source):
        found = [name] if is_url(name) or Path(name).is_file() else sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"data.source {source}: no such file: {name}")
        shards += found
    return shards


def expand_ranges(text: str) -> list[str]:
    """`a-{008..010}` becomes a-008, a-009, a-010; several ranges become all combinations, the last running fastest."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", text)
    ranges = [[str(n).zfill(len(a)) for n in range(int(a), int(b) + 1)]
              for a, b in zip(parts[1::3], parts[2::3], strict=True)]  # fmt: skip
    if not all(ranges):
        raise UserError(f"data.source {text}: a range that holds nothing; write the smaller number first")
    literals = parts[::3]
    return [
        "".join(itertools.chain(*zip(literals, [*numbers, ""], strict=True))) for numbers in itertools.product(*ranges)
    ]


def samples(shard: str, columns: Collection[str], pictures: bool) -> Iterator[TarSample]:
    """The samples of a shard in their order; the data of `columns` are read, and of all pictures if so wanted.

    Raises:
        UserError: no such shard, or no whole tar archive.
        OSError: the network or the disk failed on the way.
    """
    file = _open(shard)
    try:
        with closing(file), tarfile.open(fileobj=file, mode="r|" if is_url(shard) else "r:", tarinfo=_Member) as tar:
            key, places, read = None, {}, {}
            while (member := tar.next()) is not None:
                tar.members.clear()  # which would grow with the shard
                name = Path(member.name)
                if not member.isreg() or name.name.startswith((".", "__")) or "." not in name.name:
                    continue
                stem, column = name.name.split(".", 1)
                stem = str(name.parent / stem)
                if stem != key:
                    if key is not None:
                        yield TarSample(key, places, read)
                    key, places, read = stem, {}, {}
                places[column] = (member.offset_data, member.size)
                if column in columns or (pictures and is_picture(column)):
                    read[column] = tar.extractfile(member).read()
            if key is not None:
                yield TarSample(key, places, read)
    except (tarfile.TarError, EOFError) as error:
        if missing := getattr(file, "length", 0):  # of a server's answer, which ended before it was whole
            raise ConnectionError(f"{missing:,} bytes of {shard} did not arrive") from None
        raise UserError(
            f"data.source: shard {shard} is not a whole, uncompressed tar archive ({error}); write or fetch it again"
        ) from None


class _Member(tarfile.TarInfo):
    """A member's header. What is no header ends the archive, says tarfile; here only the end's own mark does."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


def _open(shard: str) -> IO[bytes]:
    try:
        return urllib.request.urlopen(shard, timeout=TIMEOUT) if is_url(shard) else open(shard, "rb")
    except urllib.error.HTTPError as error:
        if 400 <= error.code < 500 and error.code not in (408, 429):  # asking again would not help
            raise UserError(f"data.source: shard {shard}: {error}") from None
        raise
    except FileNotFoundError:
        raise UserError(f"data.source: shard {shard}: no such file") from None


def is_picture(column: str) -> bool:
    """Whether a column holds pictures that may be a sample's: `jpg`, but not `mask.png`, which must be asked for."""
    return column.lower() in PICTURES


def picture_column(sample: TarSample, named: str | None) -> str:
    """The column named, or the only one of pictures, which may be another from sample to sample.

    Raises:
        ValueError: the sample has none, or several.
    """
    if named is not None:
        if named not in sample.places:
            raise ValueError(f"it has no .{named}")
        return named
    found = [column for column in sample.places if is_picture(column)]
    if len(found) != 1:
        raise ValueError(f"it has {len(found) or 'no'} pictures" + (f": .{', .'.join(found)}" if found else ""))
    return found[0]


def members_for(names: Collection[str]) -> set[str]:
    """Columns to read for the fields `names`: `json.caption` is a field of .json, or else a member of that name."""
    return {*names, *(name.split(".")[0] for name in names if name.split(".")[0] in ("json", "jsn"))}


def texts_of(sample: TarSample, name: str) -> list[str]:
    """The text of a column, or of a field of its JSON, which may be a list of several.

    Raises:
        ValueError: the sample has none, or it is neither text nor JSON.
    """
    if name in sample.read:
        return [sample.read[name].decode().strip()]
    column, *path = name.split(".")
    if column not in sample.read:
        raise ValueError(f"it has no .{column}")
    value: Any = json.loads(sample.read[column])
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or value == []:
        raise ValueError(f"its .{column} has no {'.'.join(path)}")
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def columns_of(shard: str) -> list[str]:
    """Columns of the first samples of a shard, fields of JSON among them. Raises UserError where there is no sample."""
    found: dict[str, None] = {}
    try:
        for sample in itertools.islice(samples(shard, ("json", "jsn"), pictures=False), PEEKED):
            found |= dict.fromkeys(sample.places)
            for column, text in sample.read.items():
                found |= dict.fromkeys(f"{column}.{path}" for path in _paths(text))
    except OSError as error:
        raise UserError(f"data.source: shard {shard}: {error}") from None
    if not found:
        raise UserError(f"data.source: shard {shard} holds no samples, which are files such as 0001.jpg and 0001.txt")
    return list(found)


def _paths(text: bytes) -> Iterator[str]:
    """Dotted names of the texts and numbers, and of lists of them, in a JSON object."""

    def walk(value: Any, prefix: str) -> Iterator[str]:
        for name, inner in value.items():
            if isinstance(inner, dict):
                yield from walk(inner, f"{prefix}{name}.")
            elif isinstance(inner, str | int | float) or (
                isinstance(inner, list) and inner and isinstance(inner[0], str)
            ):
                yield prefix + name

    try:
        value = json.loads(text)
    except ValueError:
        return
    if isinstance(value, dict):
        yield from walk(value, "")


def index(config: DataConfig) -> tuple[Callable[[int], Image.Image], list[list[str]], int]:
    """Shards on disk for reading in any order: sample number -> picture, the captions of all samples, and how many were
    left out. Where each picture lies is noted; it is read from there when it is wanted.

    Raises:
        UserError: a shard is absent or not whole, no such column, or more samples than data.max_bad_fraction allows
            that lack a picture or a caption.
    """
    shards = shards_of(config.source)
    if any(is_url(shard) for shard in shards):
        raise UserError(f"data.source {config.source}: shards are read from URLs with data.streaming=true alone")
    needed = needed_columns(config, shards[0])
    places, captions, faults = array("q"), [], []
    everything = (
        (number, sample)
        for number, shard in enumerate(tqdm(shards, desc="reading shards", unit="", delay=5, leave=False))
        for sample in samples(shard, members_for(needed), pictures=False)
    )
    for number, sample in itertools.islice(everything, config.max_images):
        try:
            place = sample.places[picture_column(sample, config.image_column)]
            captions.append(captions_of(sample, config, needed))
            places.extend((number, *place))
        except ValueError as error:
            faults.append(f"sample {sample.key} of {shards[number]}: {error}")
    allowed = config.max_bad_fraction * (len(captions) + len(faults))
    if not captions or len(faults) > allowed:
        raise UserError(
            f"data.source {config.source}: {len(faults)} of {len(captions) + len(faults)} samples lack a picture or a "
            f"caption, more than data.max_bad_fraction {config.max_bad_fraction:g} allows; the first is {faults[0]}"
        )
    if faults:
        more = f"; so are {len(faults) - 1} more" if len(faults) > 1 else ""
        tqdm.write(f"warning: {faults[0]}; skipped{more}", file=sys.stderr)

    def read_image(index: int) -> Image.Image:
        number, first, length = places[3 * index : 3 * index + 3]
        with open(shards[number], "rb") as file:
            file.seek(first)
            return open_picture(file.read(length))

    return read_image, captions, len(faults)


def needed_columns(config: DataConfig, shard: str) -> list[str]:
    """The columns captions are made of. Raises UserError where the first samples of `shard` lack them, or pictures."""
    columns = columns_of(shard)
    pictures = [column for column in columns if is_picture(column)]
    if config.image_column is None and not pictures:
        raise UserError(f"data.image_column must be set: no column is of pictures; {shard} has {', '.join(columns)}")
    if config.image_column is not None and config.image_column not in columns:
        raise UserError(f"data.image_column {config.image_column!r}: no such column; {shard} has {', '.join(columns)}")
    return caption_columns(config, columns)


def captions_of(sample: TarSample, config: DataConfig, needed: Collection[str]) -> list[str]:
    """Raises ValueError where the sample lacks what its captions are made of."""
    said = {name: texts_of(sample, name) for name in needed}
    if config.label_names:
        said = {
            name: texts(config, None, name, [int(t) if t.isdigit() else t for t in of]) for name, of in said.items()
        }
    return make_captions(config, said)


def check_ends(shards: list[str]) -> None:
    """Raises UserError where a shard on disk lacks the mark with which a tar archive ends; only the mark is read."""
    for shard in shards:
        if is_url(shard):
            continue
        with open(shard, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            if size % tarfile.BLOCKSIZE or file.read() != bytes(2 * tarfile.BLOCKSIZE):
                raise UserError(f"data.source: shard {shard} is no tar archive, or cut short; write or fetch it again")


def _without_query(source: str) -> str:
    return source.split("?")[0] if is_url(source) else source
