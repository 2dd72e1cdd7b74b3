"""Drawing that can be interrupted: picture n is a function of (seed, n), and a file of its own once it is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.files import write_image
from ldm.training import randomness
from pipelines.evaluation.model import Painter
from pipelines.evaluation.stored import Pictures, written


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
) -> Pictures:
    """Draws what `folder` lacks of the pictures of `captions`, as 000000.png …

    Raises:
        RunError: a picture could not be written; those that were are kept.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(".*.png"):  # of a process that was killed
        partial.unlink()
    drawn = {number for number in range(len(captions)) if _is_whole(_path(folder, number))}
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
                _write(pixels[number - start], _path(folder, number))
            bar.update(len(missing))
    return Pictures(lambda numbers: torch.stack([_read(_path(folder, n)) for n in numbers]), range(len(captions)))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _read(path: Path) -> Tensor:
    """uint8 (3, H, W)"""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _is_whole(path: Path) -> bool:
    try:
        return _read(path) is not None
    except (OSError, SyntaxError):  # of a file that is not there, or was cut by a machine that fell over
        return False


def _write(pixels: Tensor, path: Path) -> None:
    with written(path):
        write_image(Image.fromarray(pixels.permute(1, 2, 0).numpy()), path)
