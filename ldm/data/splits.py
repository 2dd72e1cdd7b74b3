"""The splits of a data set, and its captions where nobody said which column they are: for what reads any data set."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import datasets

from ldm.config import DataConfig
from ldm.data import tars
from ldm.data.captions import load_table
from ldm.data.check import proposed, proposed_of_tars
from ldm.data.columns import caption_columns, is_bare_number
from ldm.data.text_files import IMAGE_SUFFIXES, NOT_TRAINED_ON, is_folder_of_text_files, split_folders
from ldm.errors import UserError
from ldm.files import expanded

WHOLE = "all"
"""Stands for the split of a source that has one, without a name."""


def splits_of(source: str) -> dict[str, DataConfig]:
    """Name -> what opens that split of `source`, which is named as `data.source` is, or a folder of parquet files
    whose names begin with their split's.

    Raises:
        UserError: no such source.
    """
    if source in ("shapes", "digits"):
        return {name: DataConfig(source=source, split=name) for name in ("train", "test")}
    folder = expanded(source)
    if tars.is_tars(source):
        return {WHOLE: DataConfig(source=source)}
    if source.endswith(".parquet"):
        return {_begins_with_split(folder.name) or WHOLE: DataConfig(source=source)}
    if folder.is_dir() and (found := _parquet_files(folder)):
        return {name: DataConfig(source=pattern) for name, pattern in found.items()}
    if is_folder_of_text_files(str(folder)):
        config = DataConfig(source=str(folder))
        return {name: replace(config, split=name) for name in split_folders(folder)} or {WHOLE: config}
    return {name: DataConfig(source=source, split=name) for name in _named_splits(source)}


def choose_split(source: str, there: Mapping[str, object], asked: str | None) -> str:
    """The split asked for; or else one that is not trained on, or the only one.

    Raises:
        UserError: there is no such split, or several and none that speaks for itself.
    """
    if asked is not None:
        if asked not in there:
            raise UserError(f"--split '{asked}': {source} has {', '.join(there)}")
        return asked
    for name in NOT_TRAINED_ON:
        if name in there:
            return name
    if len(there) > 1:
        raise UserError(f"{source} has the splits {', '.join(there)}; name one with --split")
    return next(iter(there))


def captioned(config: DataConfig, column: str | None, template: str | None) -> DataConfig:
    """`config` with the caption column or template that were named; where none was, with what the data speak for: a
    column of texts, or else "a photo of a {label}" over a column of class labels.

    Raises:
        UserError: there is nothing that captions could be made of; the columns that are there get listed. Or what was
            named would change nothing.
    """
    if config.source in ("shapes", "digits") or is_folder_of_text_files(config.source):
        given = {"--caption-column": column, "--caption-template": template, "--label-names": config.label_names}
        for option in (option for option, value in given.items() if value):
            raise UserError(f"{option}: {config.source} has captions of its own and no columns; leave it out")
        return config
    if column is not None or template is not None:
        found = replace(config, caption_column=column, caption_templates=[] if column or not template else [template])
        _check_label_names(found)
        return found
    if tars.is_tars(config.source):
        found, columns = proposed_of_tars(config, shards := tars.shards_of(config.source)), tars.columns_of(shards[0])
    else:
        table = load_table(config)
        found, columns = proposed(config, table), table.column_names
    if found.caption_column is None and not found.caption_templates:
        if len(columns) == 1:
            raise UserError(
                f"--data {config.source} holds no captions, only {columns[0]}; put that of each name.png into name.txt "
                "beside it, or take data with a column of texts or labels"
            )
        raise UserError(
            f"--data {config.source} holds no captions that speak for themselves; it has {', '.join(columns)}: name "
            "one with --caption-column, write them with --caption-template 'a photo of a {label}', or name labels with "
            "--label-names"
        )
    _check_label_names(found)
    return found


def _check_label_names(config: DataConfig) -> None:
    """Raises UserError where the captions of a table need no names of labels, and some are given."""
    if config.label_names and not tars.is_tars(config.source):
        kinds = load_table(config).features
        used = caption_columns(config, kinds)
        if not any(is_bare_number(kinds[name]) for name in used):
            raise UserError(f"--label-names: {', '.join(used)} of {config.source} has words of its own; leave it out")


def _begins_with_split(name: str) -> str | None:
    match = re.match(rf"(train|{'|'.join(NOT_TRAINED_ON)})(?![a-z])", name)
    return match[1] if match else None


def _parquet_files(folder: Path) -> dict[str, str]:
    """Split -> glob of its parquet files, in the folder or in `data/` of it, as repositories of the Hub have them."""
    for place in (folder, folder / "data"):
        names = [_begins_with_split(path.name) for path in sorted(place.glob("*.parquet"))]
        if names and None not in names:
            return {name: str(place / f"{name}*.parquet") for name in dict.fromkeys(names)}
    return {}


def _named_splits(source: str) -> list[str]:
    folder = Path(source)
    if folder.is_dir():
        if not any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*")):
            load_table(DataConfig(source=source))  # which says what is amiss
        return [str(name) for name in datasets.load_dataset_builder("imagefolder", data_dir=source).config.data_files]
    if folder.exists():
        raise UserError(f"--data {source}: a file must be .parquet or .tar; name one, or a folder of images")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise UserError(f"--data {source}: no such folder or parquet file, nor the name of a Hub repository")
    try:
        builder = datasets.load_dataset_builder(source)
        return [str(name) for name in (builder.info.splits or builder.config.data_files or {})] or ["train"]
    except Exception as error:  # every fault of the data set's own files or of the network, in one line
        raise UserError(f"--data {source}: {type(error).__name__}: {str(error).splitlines()[0]}") from None
