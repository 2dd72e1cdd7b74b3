"""A run folder and its processes: begun fresh, or resumed from the newest whole checkpoint."""

import fcntl
import os
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    parse_flag_from_env,
)
from torch import nn

from ldm import configuration, hub
from ldm.clip.parts import IMAGE_ENCODER, PROCESSORS, WITH_PROJECTION, ClipParts, parts_of
from ldm.config import RunConfig, TrainingConfig
from ldm.data.order import Share
from ldm.errors import UserError
from ldm.training import checkpoint, memory, precision, sharded, tracking
from ldm.training.checkpoint import Saved
from ldm.training.compiled import compile_blocks

FREE_ON_RESUME = {
    "output_dir",
    "resume.allow",
    "data.num_workers",
    "snapshot_every",
    *(f"sample_{name}" for name in ("prompts", "guidance_scale", "prior_guidance_scale")),
    "training.wandb_project",
    *(f"training.{name}" for name in ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints")),
    *(f"training.{name}" for name in ("num_processes", "timeout_seconds")),
}
"""Keys of which the trained weights are no function."""
FIXED_ON_RESUME = {"training.optimizer"}
"""Keys that resume.allow does not free: another optimiser would take the state of one parameter for another's."""


def start(config: RunConfig, resume: bool, can_shard: bool = False) -> tuple[Accelerator, Share, Saved | None]:
    """Checks the run folder, of which a fresh run touches nothing yet, and joins the processes. `can_shard`: whether
    the script knows weights that are divided among them (FSDP2).

    Returns Accelerate with the run's precision, this process's share of every batch, and the checkpoint to go on from,
    None to begin.

    Raises:
        UserError: a fresh run would write into a used folder, or a resumed one has nothing to resume, or is not the
            run it was; or there are not as many processes as there should be.
    """
    folder = Path(config.output_dir)
    tracking.check(config.training)
    if resume:
        check_begun(folder)
        check_unchanged(config, folder / "config.yaml")
    else:
        check_unused(folder, "add --resume to continue it, or choose another")
    accelerator = join_processes(config.training, can_shard)
    newest = None
    if resume:
        if accelerator.is_main_process:  # reads all of it, which once is enough, and alone tells of damaged ones
            lock(folder, "trained")  # before a checkpoint is chosen, which a run that goes on may replace meanwhile
            newest = checkpoint.newest(folder / "checkpoints")
        (newest,) = broadcast_object_list([newest])
        if newest is None and any((folder / "checkpoints").glob("step-*")):
            raise UserError(f"--resume: {folder / 'checkpoints'} holds no whole checkpoint; start without --resume")
    share = Share(
        config.training.batch_size,
        config.training.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    return accelerator, share, None if newest is None else checkpoint.load(newest)


def join_processes(training: TrainingConfig, can_shard: bool) -> Accelerator:
    """Accelerate, over all processes of the run, which wait for each other at most `training.timeout_seconds`.

    Raises:
        UserError: there are not as many processes as there should be, or they divide weights that cannot be divided.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    sharded.check(training, can_shard, on_cpu)
    # The run's own waiting (over gloo) ends first, with words, where NCCL's watchdog ends the process without.
    timeout = timedelta(seconds=training.timeout_seconds + (0 if on_cpu else 60))
    processes = PartialState(cpu=on_cpu, timeout=timeout)
    _check_number(training.num_processes, processes.num_processes)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=sharded.mixed_precision(precision.resolve(training.precision)),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        fsdp_plugin=sharded.plugin(),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # gradients are not held twice
    )
    sharded.divide_on_cpu(accelerator)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        memory.refuse_search(training, "tried with weights that are not divided")
    return accelerator


def _check_number(wanted: int | None, actual: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", 1))
    remedy = "start them with torchrun --nproc-per-node=N, or on several GPUs with accelerate launch --multi_gpu"
    if wanted is not None and wanted != actual:
        raise UserError(f"training.num_processes {wanted}: {actual} train together; {remedy}, or set it to {actual}")
    if started != actual:
        raise UserError(f"{started} processes were started, and each would train alone; {remedy}")
    # What `accelerate launch --cpu --num_processes 2` leaves in the environment of the only process it starts
    forgotten = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_PORT" in os.environ
    if wanted is None and forgotten and "WORLD_SIZE" not in os.environ and actual == 1:
        raise UserError(
            f"accelerate launch was asked for several processes and started one; {remedy}, or set "
            "training.num_processes=1"
        )


def ready(model: nn.Module, training: TrainingConfig, accelerator: Accelerator) -> None:
    """Makes a network ready to be trained in the run's precision; where so configured, its blocks are compiled and its
    activations computed twice. Raises UserError where it cannot do that."""
    model.train()  # networks that were opened are in evaluation mode
    precision.prepare(model, accelerator.mixed_precision, accelerator.device)
    if training.gradient_checkpointing:
        memory.checkpoint_gradients(model)
    if training.compile:
        compile_blocks(model, training.activation_memory)


def claim(config: RunConfig, accelerator: Accelerator) -> Path:
    """Makes the run folder and writes config.yaml there: once all that the user gave has proved usable, so that a
    mistake leaves no folder behind.

    Raises:
        UserError: the folder cannot be written, or another process is training there.
    """
    folder = Path(config.output_dir)
    accelerator.wait_for_everyone()  # before the folder exists, all have checked it
    if accelerator.is_main_process:
        lock(folder, "trained")
        try:
            configuration.save(config, folder / "config.yaml")
        except OSError as error:
            raise cannot_write(folder, error) from None
    return folder


def cannot_write(folder: Path, error: OSError, option: str = "output_dir") -> UserError:
    return UserError(f"{option} {folder} cannot be written: {error.strerror}")


def lock(folder: Path, doing: str, option: str = "output_dir") -> None:
    """Makes `folder`, which `option` names, where there is none, and keeps other processes out of it until this one
    ends, however it ends: the system lets go of the lock. A process may lock a folder again.

    Raises:
        UserError: the folder cannot be written, or another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(folder, error, option) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(descriptor, 32).decode() or "unknown"
        raise UserError(
            f"{option} {folder} is being {doing} by process {owner}; wait for it to end, or choose another"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def check_begun(folder: Path) -> None:
    """Raises UserError unless a run was begun in `folder`; it may have ended before its first checkpoint."""
    if not (folder / "config.yaml").is_file() and not any((folder / "checkpoints").glob("step-*")):
        raise UserError(f"--resume: {folder} holds no run to go on with; start without --resume")


def check_unchanged(config: RunConfig, stored: Path) -> None:
    """Raises UserError where a resumed run would go on as another one than `stored`, its config.yaml, says."""
    if not stored.is_file():
        return
    changed = configuration.differences(configuration.load(type(config), stored), config)
    for name in FIXED_ON_RESUME & changed.keys():
        before, after = changed[name]
        raise UserError(
            f"--resume: {name} was {before}, is {after}, which no checkpoint bears; give it as it was, or begin "
            "another run"
        )
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


def component_folder(run: str, option: str, component: str, classes: tuple[str, ...] | None = None) -> Path:
    """Folder of a component that a run left in `<run>/model/`; `run` may also be a pipeline folder or Hub repository.

    `classes`: those that the component may be of, where not those that its name tells (`ldm.components.configs`).

    Raises:
        UserError: naming `option`, its value, and what is missing, damaged or not as its configuration says.
    """
    folders = _models(run, option, component)
    for folder in folders:
        if (folder / component / "config.json").is_file():
            _check_whole(run, option, folder / component, classes)
            return folder / component
    raise UserError(
        f"{option} {run}: component {component!r} missing: expected {folders[0] / component / 'config.json'}"
        "; has that run finished?"
    )


def clip_parts(run: str, option: str, images: bool = False) -> ClipParts:
    """Where a run of train_clip.py left its CLIP, or where that of a pipeline folder or Hub repository lies; as
    `component_folder`. `images`: whether the image tower and what prepares its pixels are needed."""
    parts = next(filter(None, map(parts_of, _models(run, option, "text_encoder"))), None)
    if parts is None:
        raise UserError(
            f"{option} {run}: {component_folder(run, option, 'text_encoder')} has no projection and embeds no texts; "
            "give a run of train_clip.py, what `ldm export-clip` writes, or a pipeline with a prior"
        )
    if images and None in (parts.image_encoder, parts.image_processor):
        missing = IMAGE_ENCODER if parts.image_encoder is None else PROCESSORS[0]
        raise UserError(
            f"{option} {run}: no {missing} beside {parts.text_encoder.name}, and images are to be embedded; give the "
            "run of train_clip.py that it came from, or a folder that `ldm assemble` made of that"
        )
    _check_whole(run, option, parts.text_encoder, (WITH_PROJECTION,))
    _check_whole(run, option, parts.tokenizer)
    if images:
        _check_whole(run, option, parts.image_encoder)
    return parts


def _models(run: str, option: str, component: str) -> tuple[Path, Path]:
    """The folders in which `component` of a run, or of a pipeline's folder or repository, may lie."""
    if not run:
        raise UserError(f"{option} must be set: the run folder that holds model/{component}")
    root = Path(run)
    if not root.exists() and hub.is_repository_name(run):
        try:
            root = _downloaded(run)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    return root / "model", root


@cache
def _downloaded(repository: str) -> Path:
    """Once for each process, which has all components of one commit."""
    return hub.resolve(repository)


def _check_whole(run: str, option: str, component: Path, classes: tuple[str, ...] | None = None) -> None:
    try:
        found = hub.check_component(component, classes)
        hub.check_finite(found)
        hub.check_shapes(found)
    except UserError as error:
        raise UserError(f"{option} {run}: {error}") from None


def check_agrees(
    init: str, component: str, stored: Mapping[str, Any], given: Mapping[str, Any], section: str = "model."
) -> None:
    """Raises UserError where what the user gave describes another network than the one in `init`, which is trained on
    as it is."""
    for name, value in given.items():
        there = stored.get(name)
        there = list(there) if isinstance(there, tuple) else there
        if there != value:
            raise UserError(
                f"{section}{name} {value}: the {component} of init {init} has {there}, and is trained on as it is; "
                "give that, or set init=scratch"
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
