"""Runs that go wrong: numbers that are not finite stop every process before the update, lost processes are told in
words."""

import errno
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import distributed
from torch.distributed.tensor import DTensor

from ldm.errors import RunError, Stopped
from ldm.training.checkpoint import Saved

MOST_NAMED = 8  # samples in the message; failure.json has all
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""A disk that is full, or a quota; that takes no files so large; that has become read-only."""
LESS_MEMORY = (
    "training.find_micro_batch=true, training.gradient_checkpointing=true, or more "
    "training.gradient_accumulation_steps, with resume.allow naming it"
)
GO_ON = "the last checkpoint is intact: go on with --resume"


@dataclass(frozen=True)
class Numbers:
    """What one optimiser step is judged by, alike on every process but for the samples."""

    step: int
    learning_rate: float
    samples: list[torch.Tensor]
    """Of this process, a micro-batch each."""
    values: torch.Tensor
    """(processes, 2): loss and gradient norm."""
    event: torch.cuda.Event | None
    """After it `values`, on its way from the device, is there."""


class Guard:
    """Stops all processes where the loss or the gradients' norm of any is not finite, and counts skipped updates.

    The update is never made. On a CPU the numbers are looked at before it. On CUDA, where looking would make the
    device wait in every step, fused AdamW is told on the device to leave everything as it is (as gradient scalers
    tell it), and the numbers are looked at one step later, or by `settle` before anything is kept. Where that cannot
    be told, with sharded weights or other optimisers, they are looked at before the update: one wait a step. DeepSpeed
    alone updates within its backward pass, before anyone can look; what is kept on disk is sound with it, too.

    With fp16 an infinite norm is an overflow: the scaler skips the update and lowers its scale, and only a scale below
    1 says that no scale helps. A skipped update counts as a step for the learning rate, but not for the moving average.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        resumed: Saved | None = None,
        of: str = "",
    ):
        """`resumed`: the checkpoint that the run goes on from, which holds what `state` gave. `of`: whose loss and
        gradients it guards, where a run has several."""
        self.accelerator, self.optimizer, self.folder, self.of = accelerator, optimizer, folder, of
        # Accelerate's own `step_was_skipped` is never true of fused optimisers, which skip by themselves.
        self.is_late = accelerator.device.type == "cuda" and accelerator.scaler is None and _can_skip(optimizer)
        self.skipped_updates = 0
        self.is_update = True
        """Whether the update after the last `check` changes the weights, which fp16's scaler may prevent."""
        self.losses: list[torch.Tensor] = []
        self.samples: list[torch.Tensor] = []
        self.unread: Numbers | None = None
        if resumed is not None and accelerator.scaler is not None and "scaler" in resumed.state:
            accelerator.scaler.load_state_dict(resumed.state["scaler"])
            self.skipped_updates = resumed.state["skipped_updates"]

    def saw(self, loss: torch.Tensor, samples: torch.Tensor) -> None:
        """Notes the loss of one micro-batch and the numbers of its samples: (B,), or of a stream (B, 2)."""
        self.losses.append(loss.detach().float())
        self.samples.append(samples)

    def check(self, gradient_norm: torch.Tensor, *, step: int, learning_rate: float) -> None:
        """Before the update of step `step` (1 is the first). Raises RunError, on the main process; others exit."""
        loss = torch.stack(self.losses).mean()
        if isinstance(gradient_norm, DTensor):
            gradient_norm = gradient_norm.full_tensor()
        values = self.accelerator.gather(torch.stack([loss, torch.as_tensor(gradient_norm).to(loss)])[None])
        if self.is_late:
            _inner(self.optimizer).found_inf = (~values.isfinite().all()).float()
        self.settle()
        event = None
        if self.is_late and values.is_cuda:
            values, event = values.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.unread = Numbers(step, learning_rate, self.samples, values, event)
        self.losses, self.samples = [], []
        if not self.is_late:
            self.settle()

    def settle(self) -> None:
        """Looks at all numbers so far: what is saved after this is sound. Raises as `check` does."""
        numbers, self.unread = self.unread, None
        if numbers is None:
            return
        if numbers.event is not None:
            numbers.event.synchronize()
        losses, norms = numbers.values.cpu().T
        if not losses.isfinite().all():
            self._fail(numbers, "loss", losses)
        scaler, self.is_update = self.accelerator.scaler, bool(norms.isfinite().all())
        if not self.is_update and (scaler is None or scaler.get_scale() < 1):
            self._fail(numbers, "gradient norm", norms)
        self.skipped_updates += not self.is_update

    def metrics(self) -> dict[str, float]:
        """`skipped_updates` of this run so far, where any can be."""
        return {} if self.accelerator.scaler is None else {"skipped_updates": self.skipped_updates}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of fp16: the scaler's state and the count."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict(), "skipped_updates": self.skipped_updates}

    def _fail(self, numbers: Numbers, name: str, values: torch.Tensor) -> None:
        """Every process comes here, as all see the same numbers; the main one tells and records."""
        everyones = gather_object([torch.cat(numbers.samples).tolist()])
        at_fault = [rank for rank, value in enumerate(values) if not value.isfinite()]
        samples = [sample for rank in at_fault for sample in everyones[rank]]
        name = f"{self.of}'s {name}" if self.of else name
        if not self.accelerator.is_main_process:
            raise SystemExit(1)
        record = {
            "step": numbers.step,
            "learning_rate": numbers.learning_rate,
            "fault": name,
            "values": [str(float(value)) for value in values],
            "processes": at_fault,
            "samples": samples,
        }
        path = self.folder / "failure.json"
        path.write_text(json.dumps(record, indent=2))
        whose = "" if len(at_fault) == len(values) else f" of process {', '.join(map(str, at_fault))}"
        named = ", ".join(map(str, samples[:MOST_NAMED])) + (" …" if len(samples) > MOST_NAMED else "")
        raise RunError(
            f"step {numbers.step}: the {name}{whose} is {float(values[at_fault[0]])} at learning rate "
            f"{numbers.learning_rate:.2e} on samples {named} ({path} has all); the last checkpoint is intact: resume "
            "it with a lower training.learning_rate or with training.precision=fp32"
        )


def in_words(main: Callable[[], None] | None = None, *, less_memory: str = LESS_MEMORY, go_on: str = GO_ON) -> Callable:
    """Decorates a script's `main`: where memory runs out, the disk does, another process of the run is lost, or
    blocks cannot be compiled, RunError says so in one line, with what the script has against it."""
    if main is None:
        return functools.partial(in_words, less_memory=less_memory, go_on=go_on)

    @functools.wraps(main)
    def told(*arguments: Any) -> None:
        try:
            main(*arguments)
        except (RunError, Stopped):
            raise
        except (OSError, SafetensorError) as error:
            if not _is_of_disks(error):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise RunError(f"the run's files cannot be written: {reason}; make room; {go_on}") from None
        except RuntimeError as error:
            if should_reduce_batch_size(error):
                raise RunError(
                    f"memory ran out ({str(error).splitlines()[0][:120]}); set {less_memory}; {go_on}"
                ) from None
            if _is_of_compiler(error):
                reason = str(error.inner_exception).splitlines()[0][:240]
                raise RunError(
                    f"a block cannot be compiled ({type(error.inner_exception).__name__}: {reason}); set "
                    f"training.compile=false, or mend torch's compiler; {go_on}"
                ) from None
            if not _is_of_processes(error):
                raise
            if re.search("time(d )?out", str(error), re.IGNORECASE):
                raise RunError(
                    "another process of this run has not answered for training.timeout_seconds, and this one ends; "
                    f"{go_on}"
                ) from None
            raise RunError(f"another process of this run has ended, and this one with it; {go_on}") from None

    return told


def _is_of_compiler(error: RuntimeError) -> bool:
    from torch._dynamo.exc import BackendCompilerFailed  # a second of imports, for runs that fail alone

    return isinstance(error, BackendCompilerFailed)


def _is_of_disks(error: OSError | SafetensorError) -> bool:
    """Safetensors tells of the system's errors in words alone."""
    if isinstance(error, OSError):
        return error.errno in OF_DISKS
    number = re.search(r"os error (\d+)", str(error))
    return number is not None and int(number[1]) in OF_DISKS


def _is_of_processes(error: RuntimeError) -> bool:
    """Gloo has no errors of its own."""
    words = "gloo|nccl|connection (closed|reset)"
    return isinstance(error, distributed.DistError) or re.search(words, str(error), re.IGNORECASE) is not None


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `found_inf` keeps the optimiser from an update."""
    is_deepspeed, optimizer = isinstance(optimizer, DeepSpeedOptimizerWrapper), _inner(optimizer)
    if (
        is_deepspeed
        or not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        or not optimizer.defaults.get("fused")
    ):
        return False
    return not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
