"""Drawing that can be interrupted: picture n is a function of (seed, n), and a file of its own once it is drawn."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.errors import RunError
from ldm.training import randomness
from pipelines.evaluation.model import Painter


def picture_generator(seed: int, number: int) -> torch.Generator:
    """What picture `number` is drawn from."""
    return randomness.generator(seed, "evaluation", number)


def draw(
    painter: Painter,
    captions: list[str],
    folder: Path,
    seed: int,
    batch_size: int,
    settings: dict[str, Any],
    what: str = "drawing",
) -> Tensor:
    """Draws what `folder` lacks of the pictures of `captions`, as 000000.png …, and reads all: uint8 (N, 3, H, W).

    Raises:
        RunError: a picture could not be written; those that were are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.png"):  # of a process that was killed
        partial.unlink()
    drawn: dict[int, Tensor] = {
        n: found for n in range(len(captions)) if (found := _read(_path(folder, n))) is not None
    }
    with tqdm(total=len(captions), initial=len(drawn), desc=what, unit=" images", disable=None) as bar:
        for start in range(0, len(captions), batch_size):
            numbers = range(start, min(start + batch_size, len(captions)))
            missing = [number for number in numbers if number not in drawn]
            if not missing:
                continue
            # The whole batch is drawn again: sums of another batch would be rounded another way
            generators = [picture_generator(seed, number) for number in numbers]
            images = painter.paint([captions[number] for number in numbers], generators, settings)
            pixels = (images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
            for number in missing:
                drawn[number] = pixels[number - start]
                _write(drawn[number], _path(folder, number))
            bar.update(len(missing))
    return torch.stack([drawn[number] for number in range(len(captions))])


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _read(path: Path) -> Tensor | None:
    """uint8 (3, H, W), or None where there is no whole picture."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError):
        return None


def _write(pixels: Tensor, path: Path) -> None:
    partial = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(partial)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"'{path}' could not be written: {error.strerror or error}; run it again to go on") from None
