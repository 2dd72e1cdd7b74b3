"""What a run writes while it goes: progress bar, metrics.jsonl, TensorBoard, W&B if asked, picture grids."""

import json
import os
import resource
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import distributed
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from torchvision.utils import save_image as save_grid
from tqdm import tqdm

from ldm.config import TrainingConfig
from ldm.errors import UserError

UNSHOWN = ("learning_rate", "samples_per_second", "memory_gib")
"""Metrics that the progress bar has no room for, or shows itself."""


class Tracker:
    """Collects metrics as tensors and writes their means every `training.log_every` steps; silent unless `is_main`."""

    def __init__(self, folder: Path, first_step: int, training: TrainingConfig, is_main: bool):
        self.folder, self.training, self.is_main = folder, training, is_main
        self.collected: dict[str, list[torch.Tensor]] = {}
        self.logged_at = first_step, time.perf_counter()
        self.bar = tqdm(
            total=training.max_steps * training.batch_size,
            initial=first_step * training.batch_size,
            unit=" samples",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=not is_main,
        )
        if is_main:
            _forget_later_steps(folder / "metrics.jsonl", first_step)
            self.file = (folder / "metrics.jsonl").open("a")
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
            self.wandb = _wandb_run(folder, training.wandb_project) if training.wandb_project else None

    def collect(self, **metrics: torch.Tensor) -> None:
        """Keeps metrics of one micro-batch, unread, so that the device need not be waited for."""
        for name, value in metrics.items():
            self.collected.setdefault(name, []).append(value.detach())

    def logs(self, step: int) -> bool:
        """Whether `step` is a logging step: every `training.log_every`th, the first and the last."""
        return step % self.training.log_every == 0 or step in (1, self.training.max_steps)

    def step(self, step: int, **metrics: float) -> dict[str, float] | None:
        """After step `step` (1 is the first): on logging steps, writes and returns the means since the last, over all
        processes, which all come here."""
        self.bar.update(self.training.batch_size)
        if not self.logs(step):
            return None
        values = torch.stack([torch.stack(values).float().mean() for values in self.collected.values()])
        if distributed.is_initialized():
            distributed.all_reduce(values)
            values /= distributed.get_world_size()
        means = dict(zip(self.collected, values.tolist(), strict=True))
        self.collected.clear()
        (before, then), now = self.logged_at, time.perf_counter()
        self.logged_at = step, now
        speed = (step - before) * self.training.batch_size / (now - then)
        self.log(step, **means, **metrics, samples_per_second=round(speed, 2), memory_gib=round(peak_memory(), 3))
        return means

    def log(self, step: int, **metrics: float | list[float]) -> None:
        """Writes metrics of step `step` as they are; a list is a curve, over something else than steps."""
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(metrics, step=step)
        metrics = {name: value for name, value in metrics.items() if not isinstance(value, list)}
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        shown = {name: f"{value:.4g}" for name, value in metrics.items() if name not in UNSHOWN}
        self.bar.set_postfix(shown, refresh=False)

    def pictures(self, step: int, images: torch.Tensor, columns: int) -> None:
        """Writes samples/step-NNNNNN.png, a grid of images (N, 3, H, W) in [-1, 1]."""
        if not self.is_main:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        images = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
        save_grid(images, self.folder / "samples" / f"step-{step:06d}.png", nrow=columns, padding=2, pad_value=1.0)
        grid = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
        self.writer.add_image("samples", grid, step)
        if self.wandb:
            import wandb

            self.wandb.log({"samples": wandb.Image(grid)}, step=step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.is_main:
            self.file.close()
            self.writer.close()
            if self.wandb:
                self.wandb.finish()


def peak_memory() -> float:
    """The most memory this process has had, in GiB: the accelerator's where there is one, else the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check(training: TrainingConfig) -> None:
    """Raises UserError where W&B is asked for and not installed: before a run folder is made."""
    if training.wandb_project and find_spec("wandb") is None:
        raise UserError('training.wandb_project: Weights & Biases is not installed; pip install "ldm[wandb]"')


def _wandb_run(folder: Path, project: str) -> Any:
    """A run of W&B, the same one when the folder's run is resumed."""
    import wandb  # heavy, and seldom wanted

    identity = folder / "wandb-id"
    if not identity.is_file():
        identity.write_text(uuid.uuid4().hex[:12])
    try:
        return wandb.init(
            project=project,
            id=identity.read_text(),
            name=folder.name,
            dir=folder,
            config=OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")),
            resume="allow",
        )
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"training.wandb_project {project}: {reason}; wandb login, or set WANDB_MODE=offline") from None


def _forget_later_steps(path: Path, step: int) -> None:
    """Drops what a run logged after the checkpoint it resumes from: those steps are done again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # a line that a crash cut short
