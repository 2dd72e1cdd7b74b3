"""Power-function averages of the weights, from whose snapshots an average of any length is put together afterwards
(Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", §3 and appendix C).

An average's length σ_rel is the standard deviation of its profile as a share of the training so far: 0.1 is "about the
last 10 %". Good ones lie in 0.02 … 0.2 and differ from model to model; finding the best one needs no second training.

    averages/step-000500-0.050.safetensors    float16, one for each tracked length and snapshot
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from ldm.errors import UserError
from ldm.training import sharded
from ldm.training.checkpoint import Saved
from ldm.training.optim import ema_tensors, load_ema, trained, update_average

SHORTEST = 0.001  # what file names tell apart
LONGEST = 0.28  # σ_rel of γ = 0, a plain mean, is 1 / √12
NAME = re.compile(r"step-(\d+)-(\d\.\d{3})\.safetensors")


def gamma_of(length: float) -> float:
    """γ of the profile p(τ) ∝ τ^γ whose relative standard deviation is `length` (equation 126, algorithm 2)."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def length_of(gamma: float) -> float:
    """σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)) (equation 123)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def decay(step: int, gamma: float) -> float:
    """β of the update average ← β average + (1 - β) weights after step `step` (1 is the first) (equation 127)."""
    return (1 - 1 / step) ** (gamma + 1)


def profile_product(step_a: Tensor, gamma_a: Tensor, step_b: Tensor, gamma_b: Tensor) -> Tensor:
    """∫ p_a p_b dτ of two profiles p(τ) = (γ + 1) τ^γ / t^(γ + 1) on 0 … t, elementwise (equations 121 and 151)."""
    last = torch.minimum(step_a, step_b)
    powers = (last / step_a) ** gamma_a * (last / step_b) ** gamma_b
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * powers / torch.maximum(step_a, step_b)


def combination(steps: Sequence[int], lengths: Sequence[float], step: int, length: float) -> Tensor:
    """Weights (N,) in float64, of sum 1, with which N snapshots come closest to the average of `length` at `step`:
    least squares between the profiles (algorithm 3)."""
    t = torch.tensor(steps, dtype=torch.float64)
    gammas = torch.tensor([gamma_of(each) for each in lengths], dtype=torch.float64)
    wanted_t, wanted_gamma = torch.tensor([step, gamma_of(length)], dtype=torch.float64)
    products = profile_product(t[:, None], gammas[:, None], t[None], gammas[None])
    wanted = profile_product(t, gammas, wanted_t, wanted_gamma)
    weights = torch.linalg.lstsq(products, wanted[:, None], driver="gelsd").solution[:, 0]
    return weights / weights.sum()


def power_averages(model: torch.nn.Module, lengths: Sequence[float]) -> dict[str, EMAModel]:
    """An average for each length, by the name under which checkpoints and snapshots keep it."""
    return {f"average-{length:.3f}": EMAModel(trained(model).values()) for length in lengths}


def update(averages: dict[str, EMAModel], model: torch.nn.Module, step: int) -> None:
    """After step `step` (1 is the first)."""
    for name, average in averages.items():
        average.decay = average.min_decay = decay(step, gamma_of(float(name.removeprefix("average-"))))
        update_average(average, model)


def restore(saved: Saved, averages: dict[str, EMAModel], model: torch.nn.Module) -> None:
    """Puts the averages back as a checkpoint's groups of their names have them."""
    for name, average in averages.items():
        load_ema(average, model, saved.read(name, ema_tensors(average, model).get), saved.updates)


def write_snapshots(folder: Path, averages: dict[str, EMAModel], model: torch.nn.Module, step: int) -> None:
    """Each average as it is after `step`, whole or not at all. All processes call this, and the main one writes."""
    for name, average in averages.items():
        halves = {key: sharded.full(value).half() for key, value in ema_tensors(average, model).items()}
        if distributed.is_initialized() and distributed.get_rank() != 0:
            continue
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{step:06d}-{name.removeprefix('average-')}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({key: value.cpu().contiguous() for key, value in halves.items()}, temporary)
        temporary.rename(path)


@dataclass(frozen=True)
class Snapshot:
    """One average at one step."""

    step: int
    length: float
    path: Path


def snapshots(folder: Path) -> list[Snapshot]:
    """Those in `folder`, by step. Raises UserError where there are none."""
    found = [(NAME.fullmatch(path.name), path) for path in sorted(folder.glob("step-*.safetensors"))]
    kept = [Snapshot(int(match[1]), float(match[2]), path) for match, path in found if match]
    if not kept:
        raise UserError(f"{folder}: holds no snapshots of averages; train with average_lengths=[0.05,0.1] to have them")
    return kept


def combined(folder: Path, length: float, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The average of `length` at `step` (the last snapshot's where None): that step, and the weights in float32.

    Raises:
        UserError: no snapshots, a length that none is of, no snapshot of that step, or one that is damaged.
    """
    if not SHORTEST <= length <= LONGEST:
        raise UserError(f"length must be in [{SHORTEST}, {LONGEST}], got {length:g}")
    kept = snapshots(folder)
    step = kept[-1].step if step is None else step
    kept = [snapshot for snapshot in kept if snapshot.step <= step]
    if not kept or kept[-1].step != step:
        there = ", ".join(str(number) for number in sorted({snapshot.step for snapshot in snapshots(folder)}))
        raise UserError(f"step {step}: {folder} has snapshots of the steps {there}")
    weights = combination([each.step for each in kept], [each.length for each in kept], step, length)
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(kept, weights.tolist(), strict=True):
        try:
            tensors = load_file(snapshot.path)
        except (SafetensorError, OSError):
            raise UserError(f"{snapshot.path} is damaged; remove it, and the others make up for it") from None
        found = {name: value.shape for name, value in tensors.items()}
        if total and found != {name: value.shape for name, value in total.items()}:
            raise UserError(f"{snapshot.path} is of another network than {kept[0].path}; remove what does not belong")
        for name, value in tensors.items():
            share = value.double() * weight
            total[name] = total[name] + share if name in total else share
    if bad := [name for name, value in total.items() if not value.isfinite().all()]:
        raise UserError(f"{folder}: the average of {bad[0]} is not finite; take another --step or --length")
    return step, {name: value.float() for name, value in total.items()}
