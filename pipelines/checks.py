"""What a prompt and the settings of a picture must be. Imports nothing heavy: the command line asks it first."""

import math
from numbers import Integral, Real
from typing import Any

from ldm.errors import UserError


def check_prompt(name: str, prompt: object, may_be_empty: bool = False) -> list[str]:
    """The prompt or prompts as a list. Raises `UserError` for anything but text, and for an empty one."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts:
        raise UserError(f"{name} is an empty list; give at least one text, e.g. ['a photo of a cat']")
    for text in prompts:
        if not isinstance(text, str):
            raise UserError(
                f"{name} must be a text or a list of texts, not {type(text).__name__} ({str(text)[:40]!r}); "
                "e.g. 'a photo of a cat'"
            )
        if not text.strip() and not may_be_empty:
            raise UserError(f"{name} {text[:40]!r} is empty; say what to draw, e.g. 'a photo of a cat'")
        if not text.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
            raise UserError(f"{name} {text[:40]!a} is not valid Unicode text; give it in UTF-8")
    return prompts


def check_count(name: str, value: object, smallest: int = 1, largest: int | None = None) -> int:
    """A whole number in `smallest..largest`. Raises `UserError` otherwise."""
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or value < smallest or (largest is not None and value > largest):
        wanted = f"a whole number >= {smallest}" if largest is None else f"a whole number from {smallest} to {largest}"
        raise UserError(f"{name} is {value!r}; it must be {wanted}")
    return int(value)


def check_scale(name: str, value: object) -> float:
    """A finite number >= 0. Raises `UserError` otherwise."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name} is {value!r}; it must be a finite number >= 0, e.g. 3.0 (1 or less: no guidance)")
    return float(value)


def check_share(name: str, value: object) -> float:
    """A number in 0..1. Raises `UserError` otherwise."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; it must be a number from 0 to 1")
    return float(value)


def check_interval(name: str, value: object) -> tuple[float, float]:
    """Two numbers in 0..1, the first not the larger. Raises `UserError` otherwise."""
    good = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(end, Real) for end in value)
    if not good or not 0 <= value[0] <= value[1] <= 1:
        raise UserError(f"{name} is {value!r}; it must be two numbers from 0 to 1, the first not the larger")
    return float(value[0]), float(value[1])


def check_pair(name: str, value: object, smallest: int = 1) -> tuple[int, int]:
    """Two whole numbers of pixels, height before width. Raises `UserError` otherwise."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UserError(f"{name} is {value!r}; it must be two numbers of pixels, such as (256, 256)")
    return check_count(name, value[0], smallest), check_count(name, value[1], smallest)


def check_size(name: str, value: object, multiple: int) -> int:
    """A number of pixels that the autoencoder's factor `multiple` divides. Raises `UserError` otherwise."""
    check_count(name, value)
    if value % multiple:
        nearest = max(multiple, round(value / multiple) * multiple)
        raise UserError(
            f"{name} is {value}; it must be a multiple of the autoencoder's factor {multiple}; the nearest is {nearest}"
        )
    return int(value)


def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raises `UserError` for a tensor of another shape."""
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; these settings need {shape}")
