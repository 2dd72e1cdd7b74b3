"""A run folder and its processes: begun fresh, or resumed from the newest whole checkpoint."""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm import config as configuration
from ldm import hub
from ldm.config import RunConfig
from ldm.data.order import Share
from ldm.errors import UserError
from ldm.training import checkpoint, precision
from ldm.training.checkpoint import Checkpoint

FREE_ON_RESUME = {
    "output_dir",
    "resume.allow",
    "data.num_workers",
    *(f"training.{name}" for name in ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints")),
}
"""Keys of which the trained weights are no function."""


def start(config: RunConfig, resume: bool) -> tuple[Accelerator, Share, Checkpoint | None]:
    """Checks the run folder, which is not touched yet.

    Returns Accelerate with the run's precision, this process's share of every batch, and the checkpoint to go on from,
    None to begin.

    Raises:
        UserError: a fresh run would write into a used folder, or a resumed one has nothing to resume, or is not the
            run it was.
    """
    folder = Path(config.output_dir)
    if not resume:
        check_unused(folder, "add --resume to continue it, or choose another")
    newest = checkpoint.newest(folder / "checkpoints") if resume else None
    started = (folder / "config.yaml").is_file() and not any((folder / "checkpoints").glob("step-*"))
    if resume and newest is None and not started:  # a run that ended before its first checkpoint begins again
        raise UserError(f"--resume: {folder / 'checkpoints'} holds no whole checkpoint; start without --resume")
    if resume:
        check_unchanged(config, folder / "config.yaml")
    accelerator = Accelerator(
        mixed_precision=precision.resolve(config.training.precision),
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
    )
    share = Share(
        config.training.batch_size,
        config.training.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    return accelerator, share, None if newest is None else checkpoint.load(newest)


def claim(config: RunConfig, accelerator: Accelerator) -> Path:
    """Makes the run folder and writes config.yaml there: once all that the user gave has proved usable, so that a
    mistake leaves no folder behind.

    Raises:
        UserError: the folder cannot be written, or another process is training there.
    """
    folder = Path(config.output_dir)
    accelerator.wait_for_everyone()  # before the folder exists, all have checked it
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder, "trained")
            configuration.save(config, folder / "config.yaml")
        except OSError as error:
            raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    return folder


def lock(folder: Path, doing: str) -> None:
    """Keeps other processes out of `folder` until this one ends, however it ends: the system lets go of the lock."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 32).decode() or "unknown"
        raise UserError(
            f"output_dir {folder} is being {doing} by process {owner}; wait for it to end, or choose another"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def check_unchanged(config: RunConfig, stored: Path) -> None:
    """Raises UserError where a resumed run would go on as another one than `stored`, its config.yaml, says."""
    if not stored.is_file():
        return
    changed = configuration.differences(configuration.load(type(config), stored), config)
    refused = {name: values for name, values in changed.items() if name not in {*FREE_ON_RESUME, *config.resume.allow}}
    if refused:
        told = "; ".join(f"{name} was {before}, is {after}" for name, (before, after) in refused.items())
        raise UserError(
            f"--resume: not the run of {stored}: {told}; give it as it was, or allow the change with "
            f"resume.allow=[{','.join(refused)}]"
        )


def check_unused(folder: Path, remedy: str) -> None:
    """Raises UserError unless `folder` is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir {folder} is already in use; {remedy}")


def component_folder(run: str, option: str, component: str) -> Path:
    """Folder of a component that a run left in `<run>/model/`; `run` may also be a pipeline folder or Hub repository.

    Raises:
        UserError: naming `option`, its value, and what is missing or half-written.
    """
    if not run:
        raise UserError(f"{option} must be set: the run folder that holds model/{component}")
    root = Path(run)
    if not root.exists() and run.count("/") == 1 and not run.startswith((".", os.sep)):
        root = hub.resolve(run)
    for folder in (root / "model", root):
        if (folder / component / "config.json").is_file():
            hub.check_component(folder / component, component)
            return folder / component
    raise UserError(
        f"{option} {run}: component {component!r} missing: expected {root / 'model' / component / 'config.json'}"
        "; has that run finished?"
    )


def check_fits(option: str, run: str, component: str, stored: Mapping[str, Any], **needed: Any) -> None:
    """Raises UserError where the configuration of a component that training starts from is not as the data and the
    other stages need it."""
    for name, value in needed.items():
        if stored.get(name) != value:
            raise UserError(
                f"{option} {run}: its {component} has {name} {stored.get(name)}, but the data and the other stages of "
                f"this run need {value}; start from a run that fits, or set {option}=scratch"
            )
