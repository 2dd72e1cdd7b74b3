"""Configurations from YAML and `key=value` overrides, and back; unknown keys are named with the nearest known one."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from ldm import files
from ldm.errors import UserError, nearest

Config = TypeVar("Config")
Built = TypeVar("Built")
SIZES = ("block", "channels", "dim", "heads", "layers", "size", "sizes", "width")
"""Last words of keys whose numbers are counts of what there must be one of."""


def load(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration of class `kind` from a YAML file; `overrides` are `key=value`, dots descend.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest is named), or a value out of its range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    schema = OmegaConf.structured(kind)
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"override {override!r} is not of the form key=value, such as training.max_steps=500")
    try:
        merged = OmegaConf.merge(schema, OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{path}: {', '.join(sorted(missing))} must be set")
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        key = error.full_key or error.key
        raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), _keys(kind))}") from None
    except (OmegaConfBaseException, YAMLError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        key = getattr(error, "full_key", None)
        if key and str(error).startswith("Incompatible value 'None'"):
            raise UserError(f"{path}: {key} needs a value; it may not be empty, or null") from None
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from None


def save(config: Any, path: Path) -> None:
    """Writes a configuration as YAML that `load` reads back to an equal one, whole or not at all."""
    files.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def differences(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys of two configurations of one class whose values differ, dots descending: the two values of each."""
    found = {}
    for item in dataclasses.fields(before):
        name, values = prefix + item.name, (getattr(before, item.name), getattr(after, item.name))
        if all(dataclasses.is_dataclass(value) for value in values):
            found |= differences(*values, f"{name}.")
        elif values[0] != values[1]:
            found[name] = values
    return found


def check_arguments(section: str, arguments: dict[str, Any], build: type) -> None:
    """Raises UserError where `arguments` names one that `build` (a class or function) does not take, or a size that is
    none."""
    known = [name for name in inspect.signature(build).parameters if name != "self"]
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"unknown key '{section}.{name}'{nearest(name, known)}")
        sizes = value if isinstance(value, list) else [value]
        if name.rpartition("_")[2] in SIZES and any(isinstance(size, int) and size < 1 for size in sizes):
            raise UserError(f"{section}.{name} must be at least 1, got {value}")


def built(
    section: str,
    kind: Callable[..., Built],
    arguments: Mapping[str, Any],
    follows: Mapping[str, Any] | None = None,
) -> Built:
    """`kind(**arguments, **follows)`; `follows` is what the data and the other stages leave no choice of.

    Raises:
        UserError: it refuses the values of that section, or one is another than what follows.
    """
    follows = follows or {}
    for name, value in follows.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"{section}.{name} {arguments[name]}: it follows from the data and the other stages, and is {value}; "
                "leave it out"
            )
    try:
        return kind(**{**arguments, **follows})
    except UserError:
        raise
    except Exception as error:  # stock classes have many ways to fail at values that they do not check
        kind_of = "" if isinstance(error, ValueError) else f" cannot be built so: {type(error).__name__}"
        raise UserError(f"{section}{kind_of}: {(str(error).splitlines() or [''])[0]}") from None


def _keys(kind: type, prefix: str = "") -> list[str]:
    names = []
    for item in dataclasses.fields(kind):
        names.append(prefix + item.name)
        for part in (item.type, *get_args(item.type)):  # a section, or one that may be null
            if dataclasses.is_dataclass(part):
                names += _keys(part, prefix + item.name + ".")
    return names
