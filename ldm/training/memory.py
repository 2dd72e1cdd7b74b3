"""Training in less memory: activations computed twice, and micro-batches as large as fit."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import find_executable_batch_size
from torch import nn

from ldm.config import TrainingConfig
from ldm.data.order import Share
from ldm.errors import RunError, UserError
from ldm.training.checkpoint import Saved
from ldm.training.optim import trained

COPIES = 4
"""Of the weights, that a run has beside weights, gradients and activations: two moments, the average, DDP's buckets."""


def checkpoint_gradients(model: nn.Module) -> None:
    """Has activations computed again in the backward pass (Chen et al. 2016, arXiv:1604.06174).

    Raises:
        UserError: a network of a class that cannot.
    """
    if hasattr(model, "set_grad_checkpointing"):  # open_clip's
        model.set_grad_checkpointing()
    elif getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing()
    else:
        raise UserError(f"training.gradient_checkpointing true: {type(model).__name__} cannot do it; set it to false")


def give_back() -> None:
    """Gives the system what this process no longer uses. Compiling leaves much: graphs in reference cycles, and free
    memory between what is kept, which larger blocks cannot fill."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def refuse_search(training: TrainingConfig, reason: str) -> None:
    """Raises UserError where a script that has no use for `fitting_share` is asked for it."""
    if training.find_micro_batch:
        raise UserError(f"training.find_micro_batch true: {reason}; set it to false and choose training.batch_size")


def fitting_share(
    accelerator: Accelerator, share: Share, model: nn.Module, trial: Callable[[int], None], resumed: Saved | None = None
) -> Share:
    """`share` with the fewest accumulation steps with which `trial` fits in the memory of every process; those of the
    checkpoint where a run is resumed by as many processes, since another number would round otherwise.

    trial: computes a loss of so many samples with `model`, and its gradients. On CPUs memory has an end only where the
    system sets one: it kills a process that takes too much rather than telling it.

    Raises:
        RunError: not even a single sample fits.
    """
    if resumed is not None and resumed.state["num_processes"] == share.num_processes:
        accelerator.gradient_accumulation_steps = resumed.state["accumulation"]
        return replace(share, accumulation=resumed.state["accumulation"])
    model.to(accelerator.device)
    sizes = (n for n in range(share.micro_batch_size - 1, 0, -1) if share.micro_batch_size % n == 0)

    def tried(micro_batch_size: int) -> int:
        _held = [torch.empty_like(weight) for weight in trained(model).values() for _ in range(COPIES)]
        try:
            trial(micro_batch_size)
        finally:
            model.zero_grad(set_to_none=True)
        return micro_batch_size

    # Not as a decorator: before 1.14, Accelerate's forgets how to reduce
    search = find_executable_batch_size(tried, share.micro_batch_size, lambda: next(sizes, 0))
    try:
        fits = search()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        fits = 0
    fits = int(accelerator.gather(torch.tensor([fits], device=accelerator.device)).min())
    if not fits:
        raise RunError(
            "not even one sample fits in the memory; set training.gradient_checkpointing=true, or take a smaller "
            "model or data.image_size"
        )
    accumulation = share.accumulation * share.micro_batch_size // fits
    accelerator.gradient_accumulation_steps = accumulation
    return replace(share, accumulation=accumulation)
