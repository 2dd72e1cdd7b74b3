"""Shards that are read from one end to the other: of tar, parquet files (or their row groups), a Hub repository's."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec

from ldm.config import DataConfig
from ldm.data import tars
from ldm.data.captions import check_no_split, image_column_of, load_table
from ldm.data.columns import caption_columns, make_captions, texts
from ldm.errors import UserError


@dataclass(frozen=True)
class Row:
    """A stored sample. `picture`: its file's bytes, or path; None where `fault` says what is wrong with it."""

    name: str
    picture: bytes | str | None
    captions: list[str]
    fault: str | None = None


@dataclass(frozen=True)
class Shards:
    """`names[i]`: what messages call shard i. `rows(i, first, pictures)`: its samples from number `first` on, in the
    order they are stored in; without `pictures`, their pictures need not be there."""

    names: list[str]
    rows: Callable[[int, int, bool], Iterator[Row]]

    @property
    def count(self) -> int:
        return len(self.names)


def open_shards(config: DataConfig, num_processes: int) -> Shards:
    """The shards of `config.source`, as many as `num_processes` at least where it can be cut into so many.

    Raises:
        UserError: no such source, nothing that can be streamed, or a column that is not there.
    """
    if tars.is_tars(config.source):
        check_no_split(config)
        return _tar_shards(config)
    return _table_shards(config, num_processes)


def _tar_shards(config: DataConfig) -> Shards:
    shards = tars.shards_of(config.source)
    needed = tars.needed_columns(config, shards[0])
    tars.check_ends(shards)
    columns = tars.members_for([*needed, *([config.image_column] if config.image_column else [])])

    def rows(shard: int, first: int, pictures: bool) -> Iterator[Row]:
        of_all = pictures and config.image_column is None
        for sample in itertools.islice(tars.samples(shards[shard], columns, of_all), first, None):
            name = f"sample {sample.key} of {shards[shard]}"
            try:
                picture = sample.read.get(tars.picture_column(sample, config.image_column))
                yield Row(name, picture, tars.captions_of(sample, config, needed))
            except ValueError as error:
                yield Row(name, None, [], fault=str(error))

    return Shards(shards, rows)


def _table_shards(config: DataConfig, num_processes: int) -> Shards:
    table = load_table(config, streaming=True)
    if table.num_shards < num_processes and hasattr(table, "reshard"):
        table = table.reshard()  # parquet files into their row groups
    if table.features is None:
        raise UserError(f"data.source {config.source}: its columns have no known types; set data.streaming=false")
    image_column = image_column_of(config, table)
    needed = caption_columns(config, list(table.features), image_column)
    kinds = {name: table.features[name] for name in needed}
    table = table.select_columns([image_column, *needed]).cast_column(image_column, datasets.Image(decode=False))
    names = [f"{number} of {config.source}" for number in range(table.num_shards)]

    def rows(shard: int, first: int, pictures: bool) -> Iterator[Row]:
        part = table.shard(len(names), shard).skip(first)
        for number, row in enumerate(part if pictures else part.select_columns(needed), start=first):
            said = {name: texts(config, kind, name, row[name]) for name, kind in kinds.items()}
            picture = _stored(row[image_column]) if pictures else None
            yield Row(f"row {number} of shard {names[shard]}", picture, make_captions(config, said))

    return Shards(names, rows)


def _stored(picture: dict[str, Any]) -> bytes | str:
    """The bytes of a picture as `datasets` gives it: itself, or where it lies, which may be a URL."""
    if picture["bytes"] is not None or "://" not in picture["path"]:
        return picture["bytes"] if picture["bytes"] is not None else picture["path"]
    with fsspec.open(picture["path"]) as file:
        return file.read()
