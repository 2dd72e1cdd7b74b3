"""Checkpoints that are whole or absent: a temporary folder with a sha256 manifest, flushed to disk, then renamed.

    checkpoints/step-000500/   <group>.safetensors …, state.json, manifest.json

Tensors are kept in safetensors and everything else in JSON: no pickle is written or read. Tensors divided among
processes (`ldm.training.sharded`) are in shard-00001-….safetensors …, one file a process, instead.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from ldm import files
from ldm.errors import RunError, UserError
from ldm.training import sharded

Tensors = dict[str, torch.Tensor]
ROOM_TO_SPARE = 2**20  # bytes beyond the tensors, for the rest
NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: named groups of tensors (model, ema, optimizer …) and a JSON-able state."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, whose tensors are read when they are asked for."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def updates(self) -> int:
        """Steps whose update fp16's scaler did not skip."""
        return self.step - self.state.get("skipped_updates", 0)

    def read(self, group: str, like: sharded.Like = {}.get) -> Tensors:
        """A group of tensors. `like` gives, by name, the tensor that one is for: where that is divided among processes,
        so is what is read.

        Raises:
            UserError: there is no such group.
        """
        try:
            if sharded.is_written(self.path):
                return sharded.read(self.path, group, like)
            return sharded.divided(load_file(self.path / f"{group}.safetensors"), like)
        except FileNotFoundError:
            raise UserError(
                f"--resume {self.path}: holds no {group}, which the run had no use for when it was saved; give what "
                "resume.allow names as it was"
            ) from None


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder`/step-NNNNNN, reads it back, and only then removes all but the newest `keep` up to it. Later ones,
    damaged where a run went on from one before, stay until their step is reached.

    All processes of a run call this. The main one writes; where tensors are divided, each writes its part.

    Raises:
        RunError: no room, or the disk failed; checkpoints written before are as they were.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    temporary = folder / f".{final.name}.tmp"
    is_main = not distributed.is_initialized() or distributed.get_rank() == 0
    is_sharded = any(sharded.is_sharded(tensors.values()) for tensors in checkpoint.tensors.values())
    if not is_main and not is_sharded:
        return final
    try:
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _check_room(folder, checkpoint)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        digests = _write_shards(temporary, checkpoint) if is_sharded else _write_whole(temporary, checkpoint)
        if not is_main:
            return final
        _finish(temporary, checkpoint, digests)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        files.flush(folder)
        if not _is_whole(final):
            raise OSError(None, "what was written is not what is read back")
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(
            f"checkpoint {final} could not be written: {reason}; earlier ones are intact: make room, or free the "
            "folder for writing, and go on with --resume"
        ) from None
    for old in [path for path in _by_age(folder) if _step_of(path) <= checkpoint.step][:-keep]:
        shutil.rmtree(old)
    return final


def _check_room(folder: Path, checkpoint: Checkpoint) -> None:
    needed = sum(
        value.numel() * value.element_size() for tensors in checkpoint.tensors.values() for value in tensors.values()
    )
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM_TO_SPARE:
        raise OSError(None, f"it takes {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")


def _write_whole(temporary: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes one file a group. Returns sha256 by file name."""
    for name, tensors in checkpoint.tensors.items():
        # Clones, because safetensors refuses tensors that share memory, as tied weights and views do.
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
                  temporary / f"{name}.safetensors")  # fmt: skip
    return {path.name: files.sha256(path) for path in temporary.iterdir()}


def _write_shards(temporary: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Writes one file a process, all of them together. Returns sha256 by file name, of all."""
    distributed.barrier()  # the folder is there
    own = {path.name: files.sha256(path) for path in sharded.write(temporary, checkpoint.tensors)}
    return {name: digest for digests in gather_object([own]) for name, digest in digests.items()}


def _finish(temporary: Path, checkpoint: Checkpoint, digests: dict[str, str]) -> None:
    """Writes state and manifest; all files are on disk when this returns."""
    state = temporary / "state.json"
    state.write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=2))
    manifest = dict(sorted({**digests, state.name: files.sha256(state)}.items()))
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in temporary.iterdir():
        files.make_readable(path)
        files.flush(path)
    files.flush(temporary)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose files agree with its manifest; damaged ones are named on stderr."""
    for path in reversed(_by_age(folder)):
        if _is_whole(path):
            return path
        print(f"warning: checkpoint {path} is damaged; taking the one before", file=sys.stderr)
    return None


def load(path: Path) -> Saved:
    """Opens a checkpoint that `newest` has verified."""
    state = json.loads((path / "state.json").read_text())
    return Saved(path, state.pop("step"), state)


def _by_age(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return bool(manifest) and all(files.sha256(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False
