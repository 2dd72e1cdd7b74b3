"""Which columns captions are made of, and how."""

import functools
import re
import string
from collections.abc import Collection

from datasets import ClassLabel

from ldm.config import DataConfig
from ldm.errors import UserError


def caption_columns(config: DataConfig, columns: Collection[str], image_column: str | None = None) -> list[str]:
    """What captions are made of: `caption_column`, or the columns that the templates name.

    Raises:
        UserError: neither is set, or one is not among `columns`, or is the image's; those that are get listed.
    """
    there = f"it has {', '.join(columns)}"
    if config.caption_column is not None:
        if config.caption_column not in columns or config.caption_column == image_column:
            raise UserError(
                f"data.caption_column {config.caption_column!r}: {config.source} has no such column; {there}"
            )
        return [config.caption_column]
    if not config.caption_templates:
        raise UserError(
            f"data: set caption_column or caption_templates, such as 'a photo of a {{label}}'; "
            f"{config.source} has the columns {', '.join(columns)}"
        )
    needed = {name for template in config.caption_templates for name in _columns_of(template)}
    if absent := sorted(needed - (set(columns) - {image_column})):
        raise UserError(f"data.caption_templates name {absent[0]!r}: {config.source} has no such column; {there}")
    return sorted(needed)


def make_captions(config: DataConfig, row: dict[str, list[str]]) -> list[str]:
    """The captions of a row of `caption_columns`, whose values are `texts`: those of the column, or each template
    filled in with the first of each. The first template stands in for one that would say the same words twice:
    "a {name}, a kind of {concept}" where both are "camel"."""
    if config.caption_column is not None:
        return row[config.caption_column]
    row, first = {name: values[0] for name, values in row.items()}, config.caption_templates[0]
    return [fill_template(first if _repeats(template, row) else template, row) for template in config.caption_templates]


def _repeats(template: str, row: dict[str, str]) -> bool:
    """Whether two columns that `template` names hold the same words."""
    values = [row[name].lower() for name in _columns_of(template)]
    return len(set(values)) < len(values)


@functools.cache
def _columns_of(template: str) -> frozenset[str]:
    try:
        return frozenset(name for _, name, _, _ in string.Formatter().parse(template) if name)
    except ValueError as error:
        raise UserError(f"data.caption_templates {template!r}: {error}; name a column as {{label}}") from None


def is_bare_number(feature: object) -> bool:
    """Whether a column holds whole numbers without names, as `label_names` are for."""
    return not isinstance(feature, ClassLabel) and str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def as_text(value: object) -> str:
    """A value of a column; where there is none, the empty text."""
    return "" if value is None else str(value)


def texts(config: DataConfig, feature: object, column: str, value: object) -> list[str]:
    """A value as one caption or, where it is a list, as several; an empty list is one that says nothing."""
    if not isinstance(value, list):
        return [words(config, feature, column, value)]
    return [words(config, getattr(feature, "feature", None), column, one) for one in value or [None]]


def words(config: DataConfig, feature: object, column: str, value: object) -> str:
    """A value as words: class labels become their names, of the data set or `label_names`."""
    names = feature.names if isinstance(feature, ClassLabel) else config.label_names
    if not names or not isinstance(value, int):
        return as_text(value)
    if not 0 <= value < len(names):
        raise UserError(f"data.label_names has {len(names)} names, but column {column!r} holds {value}")
    return names[value]


def fill_template(template: str, row: dict[str, str]) -> str:
    """The template with its columns filled in; "a {label}" becomes "an airplane" where the word asks for it."""
    text = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name:
            value = row[name]
            if value[:1].lower() in "aeiou" and re.search(r"\b[Aa] $", text):
                text = text[:-1] + "n "
            text += value
    return text
