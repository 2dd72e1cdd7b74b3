"""What a prompt and the settings of a picture must be. Imports nothing heavy: the command line asks it first."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from ldm.errors import UserError

LONGEST_PROMPT = 100_000
"""Characters. What is beyond a text tower's context is cut, but the tokeniser has to read it first."""

LARGEST_SIDE = 8192
"""Pixels of an image's side: beyond it a slip of the hand would fill the memory."""

MOST_IMAGES = 100_000
"""Of one command: beyond it a slip of the hand would fill the disk."""

MOST_AT_ONCE = 10_000
"""Pictures of one call, all of which are drawn together; nor may they have more pixels than one of the largest side."""


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
        if len(text) > LONGEST_PROMPT:
            raise UserError(
                f"{name} {text[:40]!a}… has {len(text)} characters; give at most {LONGEST_PROMPT}, of which the first "
                "few hundred are read"
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


def check_at_once(
    name: str, value: object, texts: int = 1, size: tuple[int, int] | None = None, smallest: int = 1
) -> int:
    """How many pictures of `size`, (H, W), or embeddings are made together of each of so many `texts`. Raises
    `UserError` for too many."""
    count, most, what = check_count(name, value, smallest), MOST_AT_ONCE, "embeddings"
    if size is not None:
        most, what = min(most, LARGEST_SIDE**2 // (size[0] * size[1])), f"pictures of {size[1]}×{size[0]} pixels"
    if count * texts > most:
        of = f", of {texts} prompts" if texts > 1 else ""
        raise UserError(f"{name} is {value!r}{of}; {what} are made together, at most {most}: call again for the others")
    return count


def check_scale(name: str, value: object) -> float:
    """A finite number >= 0. Raises `UserError` otherwise."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name} is {value!r}; it must be a finite number >= 0, e.g. 3.0 (1 or less: no guidance)")
    return float(value)


def check_number(name: str, value: object) -> float:
    """A finite number. Raises `UserError` otherwise."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; it must be a finite number, e.g. 0.8")
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
    """A number of pixels that the autoencoder's factor `multiple` divides, not too large. Raises `UserError` otherwise,
    naming the nearest."""
    largest = LARGEST_SIDE // multiple * multiple
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and multiple <= value <= largest and value % multiple == 0:
        return int(value)
    wanted = f"a multiple of the autoencoder's factor {multiple}"
    if whole and value > largest:
        wanted += f", at most {largest}"
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; it must be a whole number of pixels, {wanted}, e.g. {multiple * 8}")
    nearest = min(max(multiple, round(value / multiple) * multiple), largest)
    raise UserError(f"{name} is {value!r}; it must be {wanted}; the nearest is {nearest}")


def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    """Raises `UserError` for anything but a tensor of this shape."""
    if not hasattr(tensor, "to"):
        raise UserError(f"{name} is a {type(tensor).__name__}; it must be a tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; these settings need {shape}")


def check_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises `UserError` for the first name that is not among the known ones, with the nearest that is."""
    known = list(known)
    if unknown := sorted(set(names) - set(known)):
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        remedy = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(known)}"
        raise UserError(f"unknown argument '{unknown[0]}'; {remedy}")


def known_arguments(call: Callable) -> Callable:
    """A method that answers a keyword it does not know with a `UserError`, not a `TypeError`."""
    known = list(inspect.signature(call).parameters)[1:]

    @functools.wraps(call)
    def checked(self, *args, **keywords):
        check_known(keywords, known)
        return call(self, *args, **keywords)

    return checked
