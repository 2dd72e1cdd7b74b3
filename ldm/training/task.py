"""What training the U-Net in latent and in pixel space and training adapters have in common, and the whole of the
second."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from torch import Tensor, nn
from tqdm import tqdm

from ldm import configuration
from ldm.components.configs import read_json
from ldm.config import LdmConfig
from ldm.data.batches import open_data
from ldm.data.captions import CaptionedImages, as_is, open_images
from ldm.data.latents import CachedLatents
from ldm.data.order import Share, in_order
from ldm.data.pixels import Pixels
from ldm.data.stream import CaptionedStream
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.objective import squared_error
from ldm.diffusion.process import prediction_target, q_sample
from ldm.diffusion.schedule import alphas_bar, zero_terminal_snr
from ldm.errors import UserError
from ldm.training import run
from ldm.training.randomness import generator

GRID_IMAGES = 64
VALIDATION_IMAGES = 256
VALIDATION_TIMESTEPS = 10
MOST_LEFT = 0.2
"""√ᾱ of the last timestep from which drawing, which begins with noise alone, is told to go wrong. Stable Diffusion's is
0.07."""
FIRST_LAMBDA = -2.0
"""λ = log(√ᾱ / √(1 - ᾱ)) with which drawing begins where ε is predicted under the cosine schedule, of which the last
timestep has -9.9: x̂₀ = (x_t - √(1 - ᾱ) ε̂) / √ᾱ magnifies the errors of ε̂ by e^-λ, there 20,000 times. The ablations' ε
(200 pictures, 10 steps) has a Fréchet distance of 366 from there on, 338 from Diffusers' -5.1, 255 from Stable
Diffusion's -2.7, 229 from -2, 239 from -1.5. Where noise of that kind is predicted well it costs little: v, drawn from
t = 900, goes from 236 to 249. The other schedules end at -5.1 and -2.7, and are drawn from there."""


@dataclass(frozen=True)
class Task:
    """What differs between them."""

    data: CachedLatents | Pixels | CaptionedImages | CaptionedStream
    unet: nn.Module
    alpha_bar: Tensor
    """ᾱ (T,) in float64."""
    conditions: Callable[[dict[str, Tensor], torch.Generator, Share, slice], dict[str, Tensor]]
    """(batch, generator, share, part) -> further arguments of the U-Net for this process's part of the batch."""
    samples: Callable[[nn.Module], Tensor | None]
    """The U-Net -> images (N, 3, S, S) in [-1, 1] of the same noise at every call, or None."""
    save: Callable[[nn.Module, Path], None]
    validation: CachedLatents | Pixels | CaptionedImages | None
    """Images that are not trained on."""
    encoded: Callable[[dict[str, Any]], dict[str, Any]] = as_is
    """A batch of `data` -> with latents, where it has none."""


@torch.no_grad()
def validation_losses(
    config: LdmConfig, network: nn.Module, task: Task, alpha_bar: Tensor
) -> dict[str, float | list[float]]:
    """Mean squared error of the prediction on images not trained on, at the middles of equal parts of 0 … T - 1, and
    their mean: the same images, noise and dropped conditions at every call, so that only the weights make a difference.
    """
    device, size = alpha_bar.device, config.training.batch_size
    errors: list[list[Tensor]] = [[] for _ in range(VALIDATION_TIMESTEPS)]
    for indices in in_order(min(VALIDATION_IMAGES, len(task.validation)), size, task.validation.buckets):
        batch = task.encoded(task.validation.__getitems__([(0, index) for index in indices]))
        share = Share(len(indices))
        draw = generator(config.seed, "validation", indices[0])
        conditions = task.conditions(batch, draw, share, share.slice(0))
        z_0 = batch["latent_mean"].to(device)
        for part, collected in enumerate(errors):
            t = torch.full((len(z_0),), (2 * part + 1) * config.num_train_timesteps // (2 * VALIDATION_TIMESTEPS))
            noise, t = torch.randn(z_0.shape, generator=draw).to(device), t.to(device)
            z_t = q_sample(z_0, alpha_bar[t], noise).contiguous(memory_format=torch.channels_last)
            output = network(z_t, t, **conditions).sample.float()[:, : z_0.shape[1]]
            collected.append(squared_error(output, prediction_target(config.prediction_type, z_0, alpha_bar[t], noise)))
    over_t = [torch.cat(collected).mean().item() for collected in errors]
    return {"validation_loss": sum(over_t) / len(over_t), "validation_loss_over_t": over_t}


def try_step(accelerator: Accelerator, task: Task, micro_batch_size: int) -> None:
    """The gradients of some loss of so many samples, for the memory they take."""
    share, draw = Share(micro_batch_size), torch.Generator()
    is_streamed = task.data.is_streamed if isinstance(task.data, Pixels) else isinstance(task.data, CaptionedStream)
    data = task.data.excerpt(1) if is_streamed else task.data
    indices = range(len(data))
    if data.buckets is not None:  # the images of the most numbers
        largest = max(range(len(data.buckets)), key=lambda bucket: prod(data.latent_shapes[bucket]))
        indices = data.buckets[largest].tolist()
    places = [(0, indices[number % len(indices)]) for number in range(micro_batch_size)]
    batch = task.encoded(data.__getitems__(places))
    conditions = task.conditions(batch, draw, share, share.slice(0))
    z_t = batch["latent_mean"].to(accelerator.device, memory_format=torch.channels_last)
    with accelerator.autocast():
        output = task.unet(z_t, torch.zeros(len(z_t), device=z_t.device), **conditions).sample
    output.float().square().mean().backward()


def configured_alpha_bar(config: LdmConfig) -> Tensor:
    """ᾱ (T,) in float64 of the process that the configuration names; warns where it does not end in noise."""
    alpha_bar = alphas_bar(config.beta_schedule, config.num_train_timesteps)
    if config.zero_terminal_snr:
        return zero_terminal_snr(alpha_bar)
    if (left := alpha_bar[-1].sqrt().item()) > MOST_LEFT:
        tqdm.write(
            f"warning: {config.beta_schedule} over num_train_timesteps {len(alpha_bar)} ends with {left:.2f} of the "
            "picture, but drawing begins with noise alone; take beta_schedule squaredcos_cap_v2, or more timesteps",
            file=sys.stderr,
        )
    return alpha_bar


def schedule_settings(config: LdmConfig) -> dict[str, Any]:
    """The process that was trained on, as diffusers' schedulers take it."""
    settings = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_schedule": config.beta_schedule,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": config.prediction_type,
    }
    if config.zero_terminal_snr:  # sampling must then start at the very last timestep
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def warn_of_another_process(config: LdmConfig, unet: Path) -> None:
    """Tells where the U-Net in the folder `unet`, that training starts from, was trained on another process."""
    path = unet.parent / "scheduler" / "scheduler_config.json"
    stored = read_json(path) if path.is_file() else {}
    for name in ("prediction_type", "beta_schedule", "num_train_timesteps"):
        now = getattr(config, name)
        if (before := stored.get(name, now)) != now:
            tqdm.write(
                f"warning: init {config.init}: its U-Net was trained with {name}={before}, and goes on with {now}; set "
                "it alike, unless the change is meant",
                file=sys.stderr,
            )


def solver(config: LdmConfig) -> DPMSolverMultistepScheduler:
    """What a U-Net for latents is drawn with, from the last timestep or FIRST_LAMBDA on."""
    magnifies = config.prediction_type == "epsilon" and config.beta_schedule == "squaredcos_cap_v2"
    least = FIRST_LAMBDA if magnifies else -inf
    return DPMSolverMultistepScheduler(**schedule_settings(config), lambda_min_clipped=least)


def in_pixel_space(config: LdmConfig, share: Share) -> Task:
    """Images as they are, and a U-Net that is told the time and, if so configured, the caption's class."""
    configuration.check_arguments("model", config.model, UNet2DModel)
    images = open_data(config.data, config.seed, share.num_processes)
    data, validation = Pixels(images, config.greyscale, config.class_conditional), None
    if config.validation_split is not None:
        others = open_images(replace(config.data, split=config.validation_split, streaming=False), config.seed)
        validation = Pixels(others, config.greyscale, config.class_conditional)
        if validation.classes != data.classes:
            raise UserError(f"validation_split {config.validation_split}: its captions are not those of the training")
    channels, side, _ = data.latent_shape
    sizes = {
        "in_channels": channels,
        "out_channels": 2 * channels if config.variance == "learned_range" else channels,
        "sample_size": side,
        "num_class_embeds": len(data.classes) or None,
    }
    if config.init == "scratch":
        unet = configuration.built("model", UNet2DModel, config.model, sizes)
    else:
        folder = run.component_folder(config.init, "init", "unet", ("UNet2DModel",))
        warn_of_another_process(config, folder)
        unet = UNet2DModel.from_pretrained(folder)
        run.check_agrees(config.init, "U-Net", unet.config, config.model)
        run.check_fits("init", config.init, "U-Net", unet.config, **sizes)
    if side % (factor := 2 ** (len(unet.config.block_out_channels) - 1)):
        raise UserError(f"data.image_size {side}: the U-Net halves images to a {factor}th; take a multiple of {factor}")
    scheduler = DDPMScheduler(**schedule_settings(config), variance_type=config.variance)

    def conditions(batch: dict[str, Tensor], draw: torch.Generator, share: Share, part: slice) -> dict[str, Tensor]:
        if not data.classes:
            return {}
        is_dropped = torch.rand(share.batch_size, generator=draw)[part] < config.caption_dropout
        return {"class_labels": batch["class_labels"].masked_fill(is_dropped, 0).to(unet.device)}

    @torch.no_grad()
    def drawn(unet: nn.Module) -> Tensor:
        """By DDPM in 250 steps; class after class, guided, where there are classes."""
        draw = generator(config.seed, "samples", 0)
        x = torch.randn(GRID_IMAGES, *data.latent_shape, generator=draw).to(unet.device)
        labels = torch.arange(GRID_IMAGES, device=unet.device) % max(1, len(data.classes) - 1) + 1
        scheduler.set_timesteps(min(250, config.num_train_timesteps), device=unet.device)
        for t in scheduler.timesteps:
            if data.classes:
                without, prediction = (
                    unet(x, t, class_labels=given).sample for given in (torch.zeros_like(labels), labels)
                )
                guided = classifier_free_guidance(without, prediction, config.sample_guidance_scale)
                prediction = torch.cat([guided[:, :channels], prediction[:, channels:]], dim=1)  # variance: as it is
            else:
                prediction = unet(x, t).sample
            x = scheduler.step(prediction, t, x, generator=draw).prev_sample
        return x.expand(-1, 3, -1, -1)

    def save(unet: nn.Module, folder: Path) -> None:
        DDPMPipeline(unet, scheduler).save_pretrained(folder)
        if data.classes:
            (folder / "classes.json").write_text(json.dumps(data.classes, indent=2))

    return Task(data, unet, configured_alpha_bar(config), conditions, drawn, save, validation)
