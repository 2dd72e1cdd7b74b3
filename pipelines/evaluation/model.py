"""A model as an evaluation sees it: something that paints captions."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, SchedulerMixin, UNet2DModel
from torch import Tensor

from ldm import hub
from ldm.components.configs import read_json
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.errors import UserError
from pipelines.base import check_steps
from pipelines.checks import check_prompt
from pipelines.text_to_image import LatentDiffusionPipeline

PIXEL_PIPELINES = ("DDPMPipeline", "DDIMPipeline")
PIXEL_STEPS = 250


class Painter(Protocol):
    side: int
    """Of its pictures, in pixels."""
    settings: dict[str, Any]
    """How it draws unless told otherwise."""
    device: torch.device
    scheduler: SchedulerMixin
    knows_captions: bool
    """Whether these, and with them a guidance scale, mean anything to it."""

    def check_captions(self, captions: list[str]) -> None:
        """Raises `UserError` for one that cannot be painted."""

    def paint(self, captions: list[str], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        """(B, 3, H, W) in [0, 1], each image a function of its caption and generator."""


def open_painter(folder: Path, given: dict[str, Any]) -> "TextToImage | PixelSpace":
    """The model in `folder`, on an accelerator where there is one. `given`: num_inference_steps, guidance_scale, where
    they are not to be the model's own. Raises `UserError` for a folder that cannot be used."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    index = folder / hub.INDEX
    kind = read_json(index).get("_class_name") if index.is_file() else None
    return (PixelSpace if kind in PIXEL_PIPELINES else TextToImage)(folder, device, given)


def check_settings(painter: Painter, steps: dict[str, Iterable[int]], scales: dict[str, Iterable[float]]) -> None:
    """Raises `UserError` where the model cannot draw in so many steps, or with such a guidance scale. Both: option of
    the command line -> its values."""
    for option, values in steps.items():
        for value in values:
            check_steps(option, value, painter.scheduler)
    for option, values in scales.items():
        if not painter.knows_captions and any(value != 1 for value in values):
            raise UserError(f"{option} belongs to a model of captions or classes; this one knows none")


class TextToImage:
    """A pipeline of text to image, with its own settings."""

    def __init__(self, folder: Path, device: torch.device, given: dict[str, Any]):
        self.pipe = LatentDiffusionPipeline.from_pretrained(folder).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        own = {name: value for name, value in self.pipe.default_settings.items() if self.pipe.why_unread(name) is None}
        self.settings, self.device = own | given, device
        self.scheduler, self.knows_captions = self.pipe.scheduler, True
        height, width = self.pipe._image_size(None, None)
        if height != width:
            raise UserError(f"model '{folder}' draws {height}×{width} pixels; only models of squares are evaluated")
        self.side = height

    def check_captions(self, captions: list[str]) -> None:
        check_prompt("caption", captions)

    def paint(self, captions: list[str], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        return self.pipe(captions, generator=generators, output_type="pt", **settings).images


class PixelSpace:
    """What `train_ldm.py` with autoencoder=none leaves: a stock DDPM, of classes where it holds `classes.json`."""

    def __init__(self, folder: Path, device: torch.device, given: dict[str, Any]):
        hub.check_finite(hub.check_component(folder / "unet", (UNet2DModel.__name__,)))
        self.unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True).to(device).eval()
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.device, self.side = device, self.unet.config.sample_size
        self.channels = self.unet.config.in_channels
        classes = folder / "classes.json"
        self.classes: list[str] = json.loads(classes.read_text(encoding="utf-8")) if classes.is_file() else []
        steps = min(PIXEL_STEPS, self.scheduler.config.num_train_timesteps)
        self.settings = {"num_inference_steps": steps, "guidance_scale": 1.0} | given
        self.knows_captions = bool(self.classes)

    def check_captions(self, captions: list[str]) -> None:
        """Raises `UserError` for a caption that is none of the model's classes."""
        if self.classes and (unknown := sorted(set(captions) - set(self.classes))):
            raise UserError(
                f"caption {unknown[0]!r} is none of the model's classes, such as {self.classes[-1]!r}; set "
                "--caption-column or --caption-template so that they are"
            )

    @torch.no_grad()
    def paint(self, captions: list[str], generators: list[torch.Generator], settings: dict[str, Any]) -> Tensor:
        """By DDPM, as in training; the caption's class, guided, where there are classes."""
        shape = (self.channels, self.side, self.side)
        x = torch.stack([torch.randn(shape, generator=draw) for draw in generators]).to(self.device)
        labels = torch.tensor([self.classes.index(caption) for caption in captions] if self.classes else [])
        labels, scale = labels.to(self.device), settings["guidance_scale"]
        self.scheduler.set_timesteps(settings["num_inference_steps"], device=self.device)
        for t in self.scheduler.timesteps:
            if not self.classes:
                prediction = self.unet(x, t).sample
            else:
                prediction = self.unet(x, t, class_labels=labels).sample
                if scale != 1:
                    without = self.unet(x, t, class_labels=torch.zeros_like(labels)).sample
                    guided = classifier_free_guidance(without, prediction, scale)
                    # a learned variance stays as it is
                    prediction = torch.cat([guided[:, : self.channels], prediction[:, self.channels :]], dim=1)
            x = self.scheduler.step(prediction, t, x, generator=generators).prev_sample
        return ((x.expand(-1, 3, -1, -1) + 1) / 2).clamp(0, 1)
