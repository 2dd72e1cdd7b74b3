"""The weight files of a component, read no further than their headers, and whether the numbers in them are finite.

A safetensors file is a length (8 bytes, little-endian), a JSON header of that length, and the tensors one after the
other. Nothing here imports torch: a damaged file is told before it is needed.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from ldm.components.configs import missing, read_json
from ldm.errors import UserError

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
         "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip
EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""The bits that are all set in a NaN or infinity, and not all in any other number."""

LONGEST_HEADER = 100_000_000  # bytes, safetensors' own bound
NUMBERS_AT_ONCE = 2**18


class Stored(NamedTuple):
    """A tensor in a file: its bytes are [begin, end) of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_headers(folder: Path, stem: str, variant: str | None = None) -> dict[str, Stored]:
    """Name -> tensor of all weights of the component in `folder`, whose files are named `stem` (`model`, say).

    Those of `variant` where there are any, as Diffusers takes them, in one file or in shards with an index. Raises
    `UserError` for files that are missing, pickles, or not whole.
    """
    tensors: dict[str, Stored] = {}
    for file in _files(folder, stem, variant):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise UserError(f"{folder.name}: '{name}' is in {tensors[name].file.name} and in {file.name}")
            tensors[name] = tensor
    return tensors


def _files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    for kind in (f".{variant}", "") if variant else ("",):
        index = folder / f"{stem}.safetensors.index{kind}.json"
        if index.is_file():
            return _shards(index)
        if (file := folder / f"{stem}{kind}.safetensors").is_file():
            return [file]
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise pickle_only(folder.name)
    others = sorted({path.name.split(".")[1] for path in folder.glob(f"{stem}.*.safetensors")})
    further = f"; only the variant {others[0]!r} is there: open it with variant={others[0]!r}" if others else ""
    raise missing(folder.name, folder / f"{stem}.safetensors", further)


def pickle_only(component: str) -> UserError:
    return UserError(f"{component}: only a pickle (.bin) is there; convert it to safetensors")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"'{index}' does not say which file holds which weights; copy or write it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent or file.suffix != ".safetensors":
            raise UserError(f"'{index}' names '{file.name}', which is no safetensors file beside it; write it again")
        if not file.is_file():
            raise missing(index.parent.name, file)
    return files


def read_header(path: Path, needs_format: bool = True) -> dict[str, Stored]:
    """Name -> tensor of one file. Raises `UserError` unless the file is whole: as long as its header says, every tensor
    where the one before ends; and its metadata, where there are any, say that it is torch's. `needs_format`: they must
    say so, which not all that write adapters do."""
    name, size = Path(path.parent.name, path.name), path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if not 0 < length <= size - 8:
            raise _damaged(name, f"its header promises {8 + length} bytes, the file has {size}")
        header = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        tensors = _parse(path, header, needs_format)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(name, "its header cannot be read") from None
    expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if size != expected:
        raise _damaged(name, f"its header promises {expected} bytes, the file has {size}")
    return tensors


def _damaged(name: Path, what: str) -> UserError:
    return UserError(f"{name} is damaged: {what}. Download it again.")


def _parse(path: Path, header: bytes, needs_format: bool) -> dict[str, Stored]:
    """Raises ValueError, KeyError, TypeError or AttributeError for what is no header."""
    tensors, start = {}, 8 + len(header)
    for name, entry in json.loads(header.decode("utf-8")).items():
        if name == "__metadata__":
            if entry.get("format", None if needs_format else "pt") != "pt":
                raise ValueError(name)
            continue
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError(name)
        if end - begin != math.prod(shape) * BYTES[entry["dtype"]]:
            raise ValueError(name)
        tensors[name] = Stored(path, entry["dtype"], tuple(shape), start + begin, start + end)
    position = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise ValueError(tensor)
        position = tensor.end
    return tensors


def check_finite(component: str, tensors: dict[str, Stored]) -> None:
    """Raises `UserError` at the first tensor that holds a NaN or an infinity. Takes a few megabytes of memory."""
    import numpy as np

    opened: dict[Path, np.memmap] = {}
    for name, tensor in tensors.items():
        mask = EXPONENTS.get(tensor.dtype)
        if mask is None or tensor.begin == tensor.end:
            continue
        if tensor.file not in opened:
            opened[tensor.file] = np.memmap(tensor.file, mode="r")
        whole = opened[tensor.file][tensor.begin : tensor.end].view(f"<u{BYTES[tensor.dtype]}")
        mask = whole.dtype.type(mask)
        for start in range(0, len(whole), NUMBERS_AT_ONCE):
            if (whole[start : start + NUMBERS_AT_ONCE] & mask).max() == mask:
                raise UserError(
                    f"{component}: '{name}' is not finite, which draws nothing; download or train the component again"
                )
