"""Checkpoints that are whole or absent: a temporary folder with a sha256 manifest, flushed to disk, then renamed.

    checkpoints/step-000500/   <name>.safetensors …, state.json, manifest.json

Tensors are kept in safetensors and everything else in JSON: no pickle is written or read.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldm.errors import RunError

Tensors = dict[str, torch.Tensor]
ROOM_TO_SPARE = 2**20  # bytes beyond the tensors, for the rest


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: named groups of tensors (model, ema, optimizer …) and a JSON-able state."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder`/step-NNNNNN, reads it back, and only then removes all but the newest `keep` checkpoints.

    Raises:
        RunError: no room, or the disk failed; checkpoints written before are as they were.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, checkpoint)
        shutil.rmtree(temporary, ignore_errors=True)
        _write(temporary, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(folder)
        if not _is_whole(final):
            raise OSError(None, "what was written is not what is read back")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"checkpoint {final} could not be written: {reason}; earlier ones are intact: make room, or free the "
            "folder for writing, and go on with --resume"
        ) from None
    for old in _by_age(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def _check_room(folder: Path, checkpoint: Checkpoint) -> None:
    needed = sum(
        value.numel() * value.element_size() for tensors in checkpoint.tensors.values() for value in tensors.values()
    )
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM_TO_SPARE:
        raise OSError(None, f"it takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")


def _write(temporary: Path, checkpoint: Checkpoint) -> None:
    """All files of a checkpoint, on disk when this returns."""
    temporary.mkdir()
    for name, tensors in checkpoint.tensors.items():
        # Clones, because safetensors refuses tensors that share memory, as tied weights and views do.
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
                  temporary / f"{name}.safetensors")  # fmt: skip
    state = {"step": checkpoint.step, **checkpoint.state}
    (temporary / "state.json").write_text(json.dumps(state, indent=2))
    manifest = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    readable = 0o666 & ~_umask()
    for path in temporary.iterdir():
        path.chmod(readable)  # safetensors writes 0600, which other users cannot read
        _flush(path)
    _flush(temporary)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files agree with its manifest; damaged ones are named on stderr."""
    for path in reversed(_by_age(folder)):
        if _is_whole(path):
            return path
        print(f"warning: checkpoint {path} is damaged; taking the one before", file=sys.stderr)
    return None


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint that `newest` has verified."""
    state = json.loads((path / "state.json").read_text())
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(state.pop("step"), tensors, state)


def _by_age(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return bool(manifest) and all(_sha256(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Forces a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
