"""What a run writes while it goes: progress bar, metrics.jsonl, TensorBoard, picture grids."""

import json
import os
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from torchvision.utils import save_image as save_grid
from tqdm import tqdm

from ldm.config import TrainingConfig


class Tracker:
    """Collects metrics as tensors and writes their means every `training.log_every` steps; silent unless `is_main`."""

    def __init__(self, folder: Path, first_step: int, training: TrainingConfig, is_main: bool):
        self.folder, self.training, self.is_main = folder, training, is_main
        self.collected: dict[str, list[torch.Tensor]] = {}
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

    def collect(self, **metrics: torch.Tensor) -> None:
        """Keeps metrics of one micro-batch, unread, so that the device need not be waited for."""
        for name, value in metrics.items():
            self.collected.setdefault(name, []).append(value.detach())

    def step(self, step: int, **metrics: float) -> dict[str, float] | None:
        """After step `step` (1 is the first): on logging steps, writes and returns the means since the last."""
        self.bar.update(self.training.batch_size)
        if step % self.training.log_every and step != 1:
            return None
        means = {name: torch.stack(values).float().mean().item() for name, values in self.collected.items()}
        self.collected.clear()
        self.log(step, **means, **metrics)
        return means

    def log(self, step: int, **metrics: float) -> None:
        """Writes metrics of step `step` as they are."""
        if not self.is_main:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        shown = {name: f"{value:.4g}" for name, value in metrics.items() if name != "learning_rate"}
        self.bar.set_postfix(shown, refresh=False)

    def pictures(self, step: int, images: torch.Tensor, columns: int) -> None:
        """Writes samples/step-NNNNNN.png, a grid of images (N, 3, H, W) in [-1, 1]."""
        if not self.is_main:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        images = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
        save_grid(images, self.folder / "samples" / f"step-{step:06d}.png", nrow=columns, padding=2, pad_value=1.0)
        self.writer.add_image("samples", make_grid(images, nrow=columns, padding=2, pad_value=1.0), step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.is_main:
            self.file.close()
            self.writer.close()


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
