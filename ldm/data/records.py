"""Records on disk: rows of named tensors in shards, each row found by a digest of what it was made of.

    <kind>-<sha256 of the file>.safetensors    keys (n, 32) uint8, the rows' digests; refused (m, 32) uint8, of what no
                                               row could be made of; and the fields, each (n, …)

A shard bears its own sha256 in its name, so a damaged one is known without any other file. It is never changed, only
dropped as a whole. Its metadata say how its rows were made.
"""

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ldm import files
from ldm.errors import RunError, UserError

KEY_BYTES = 32
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}


def write_shard(folder: Path, kind: str, tensors: dict[str, Tensor], settings: str = "") -> Path:
    """Writes tensors as one shard, whole or not at all; `settings` go into its metadata.

    Raises:
        RunError: no room, or the disk failed; shards written before are as they were.
    """
    temporary = folder / f".{kind}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata={"settings": settings})
        final = folder / f"{kind}-{files.sha256(temporary)}.safetensors"
        files.publish(temporary, final)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{folder} cannot be written: {reason}; make room and run again, which goes on") from None
    return final


def is_whole(shard: Path) -> bool:
    """Whether a shard's bytes are those that its name says; reads all of it."""
    return shard.is_file() and shard.stem.partition("-")[2] == files.sha256(shard)


def open_shard(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a shard, mapped into memory read-only: nothing but the header is read. And its settings.

    Raises:
        UserError: no such file, or one that is cut off.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        first = 8 + int.from_bytes(memory[:8], "little")
        header = json.loads(memory[8:first])
        settings = header.pop("__metadata__", {}).get("settings", "")
        mapped = {
            name: np.ndarray(
                part["shape"], _DTYPES[part["dtype"]], buffer=memory, offset=first + part["data_offsets"][0]
            )
            for name, part in header.items()
        }
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError):  # not a header, or tensors that reach beyond the end of the file
        raise UserError(f"{path} is damaged") from None
    return mapped, settings


class Records:
    """The rows of several shards, numbered from the first shard's on. Rows are read when asked for, from memory maps;
    a copy in another process (a data worker's) maps the same files anew."""

    def __init__(self, paths: Sequence[Path]):
        """Raises UserError for a shard that is missing or cut off."""
        self.paths = list(paths)
        self.shards = [open_shard(path)[0] for path in self.paths]
        self.starts = np.cumsum([0, *(len(shard["keys"]) for shard in self.shards)])

    def __reduce__(self) -> tuple:
        return Records, (self.paths,)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, names: Sequence[str], numbers: np.ndarray, views: np.ndarray | None = None) -> dict[str, Tensor]:
        """Fields (B, …) of the rows `numbers` (B,); with `views` (B,), which of a field's second dimension is taken.
        Rows of one call must be of one shape."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        places = numbers - self.starts[shards]
        parts = [(shard, np.flatnonzero(shards == shard)) for shard in np.unique(shards)]
        values: dict[str, np.ndarray] = {}
        for shard, rows in parts:
            at = places[rows] if views is None else (places[rows], views[rows])
            for name in names:
                part = self.shards[shard][name][at]
                if len(parts) > 1 and name not in values:
                    values[name] = np.empty((len(numbers), *part.shape[1:]), part.dtype)
                if len(parts) > 1:
                    values[name][rows] = part
                else:
                    values[name] = part
            # What was read stays in the system's page cache, but would count as memory of this process.
            self.shards[shard]["keys"].base.madvise(mmap.MADV_DONTNEED)
        return {name: torch.from_numpy(array) for name, array in values.items()}
