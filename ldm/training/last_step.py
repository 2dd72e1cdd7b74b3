"""What training the last step of drawing begins with: states of drawing and noised photographs, and what the networks
are told of both."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ldm import files
from ldm.clip.export import ClipTowers
from ldm.clip.tokenizer import encode
from ldm.data.captions import CaptionedImages
from ldm.diffusion.embedding_noise import noised_embedding
from ldm.errors import UserError
from ldm.training import precision
from ldm.training.checkpoint import Saved
from ldm.training.randomness import generator, key

AT_ONCE = 64
"""States are drawn in batches of so many."""
SHA256 = "states_sha256"
"""Of a checkpoint's state: which states a run has."""


@dataclass(frozen=True)
class States:
    """Where drawing stands when its last step begins."""

    z_t: Tensor
    """(N, C, h, w)"""
    class_labels: Tensor | None
    """(N, 2D), image embeddings and their noise level, for U-Nets that these guide."""
    captions: list[str]
    sha256: str


@dataclass(frozen=True)
class Told:
    """What the U-Net is told of B pictures."""

    tokens: Tensor
    """(B, L, D_t)"""
    class_labels: Tensor | None
    """(B, 2D)"""

    def of(self, which: slice) -> "Told":
        return Told(self.tokens[which], None if self.class_labels is None else self.class_labels[which])

    def and_of(self, other: "Told") -> "Told":
        labels = None if self.class_labels is None else torch.cat([self.class_labels, other.class_labels])
        return Told(torch.cat([self.tokens, other.tokens]), labels)

    def without(self, is_dropped: Tensor, no_text: Tensor) -> "Told":
        """No caption, tokens (1, L, D_t), and no image embedding, which is all zeros, where `is_dropped` (B,)."""
        labels = None if self.class_labels is None else self.class_labels.masked_fill(is_dropped[:, None], 0.0)
        return Told(torch.where(is_dropped[:, None, None], no_text, self.tokens), labels)

    def arguments(self) -> dict[str, Tensor | None]:
        """Of the U-Net."""
        return {"encoder_hidden_states": self.tokens, "class_labels": self.class_labels}


def read(pipe: DiffusionPipeline, captions: list[str]) -> Tensor:
    """What the U-Net attends to, (B, L, D_t)."""
    return pipe.text_encoder(encode(pipe.tokenizer, captions)[0].to(pipe.device))[0].float()


def class_labels(pipe: DiffusionPipeline, embeds: Tensor, noise: Tensor) -> Tensor | None:
    """What the U-Net is told of image embeddings (B, D), noised (B, D) as in drawing; None where captions alone guide
    it."""
    if pipe.unet.config.class_embed_type is None:
        return None
    level = torch.full((len(embeds),), pipe.default_settings["noise_level"], device=embeds.device)
    alpha_bar = pipe.image_noising_scheduler.alphas_cumprod.to(embeds.device, precision.finest(embeds.device))
    return noised_embedding(embeds, *embedding_statistics(pipe, embeds.shape[1]), level, alpha_bar, noise)


def embedding_statistics(pipe: DiffusionPipeline, embedding_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of image embeddings; of unit vectors at random where the pipeline keeps none."""
    if pipe.image_normalizer is not None:
        return pipe.image_normalizer.mean[0].detach(), pipe.image_normalizer.std[0].detach()
    mean = torch.zeros(embedding_dim, device=pipe.device)
    return mean, mean + embedding_dim**-0.5


def told_to_judge(
    clip: ClipTowers, captions: list[str], embeds: Tensor, is_known: Tensor, statistics: tuple[Tensor, Tensor]
) -> Tensor:
    """What the discriminator is told of pictures, (B, 2D): the caption's embedding and, where `is_known` (B,), the
    image embedding (B, D) of the photograph that they began with, standardised by `statistics`; else zeros."""
    text = clip.text_encoder(encode(clip.tokenizer, captions)[0].to(embeds.device)).text_embeds.float()
    mean, std = statistics
    image = (embeds - mean) / std * is_known[:, None]
    return torch.cat([F.normalize(text, dim=1) * math.sqrt(text.shape[1]), image], dim=1)


def open_states(path: Path, resumed: Saved | None) -> States:
    """What `draw_states` wrote. Raises UserError where a run that is resumed had others."""
    digest = files.sha256(path) if path.is_file() else None
    if resumed is not None and resumed.state[SHA256] != digest:
        raise UserError(f"--resume: {path} is missing or damaged, and the run cannot go on without it; begin another")
    with safe_open(path, "pt") as stored:
        captions = json.loads(stored.metadata()["captions"])
    tensors = load_file(path)
    return States(tensors["z_t"], tensors.get("class_labels"), captions, digest)


@torch.no_grad()
def draw_states(
    path: Path,
    count: int,
    seed: int,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    data: CaptionedImages,
) -> None:
    """Writes `count` states of captions of the data, drawn by a text-to-image pipeline with its settings, each a
    function of the seed and its number. Every process draws its part."""
    per_process = -(-count // accelerator.num_processes)
    captions = [
        _caption(data, key(seed, "caption of a state", n)) for n in range(per_process * accelerator.num_processes)
    ]
    kept: dict[str, list[Tensor]] = {"z_t": [], "class_labels": []}

    def keep(_: DiffusionPipeline, step: int, _t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == pipe.default_settings["num_inference_steps"] - 2:
            kept["z_t"].append(tensors["latents"].float())
            if tensors["image_embeds"] is not None:
                kept["class_labels"].append(tensors["image_embeds"][-len(tensors["latents"]) :].float())
        return {}

    first = per_process * accelerator.process_index
    own = range(first, first + per_process)
    with tqdm(total=count, desc="states", unit=" states", disable=not accelerator.is_main_process) as bar:
        for numbers in _in_parts(own, AT_ONCE):
            with accelerator.autocast():
                pipe(
                    [captions[number] for number in numbers],
                    generator=[generator(seed, "state", number) for number in numbers],
                    output_type="latent",
                    callback_on_step_end=keep,
                    callback_on_step_end_tensor_inputs=("latents", "image_embeds"),
                )
            bar.update(len(numbers) * accelerator.num_processes)
    parts = {name: torch.cat(values) for name, values in kept.items() if values}
    tensors = {name: accelerator.gather(values)[:count].cpu().contiguous() for name, values in parts.items()}
    if accelerator.is_main_process:
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"captions": json.dumps(captions[:count])})
        files.publish(temporary, path)
    accelerator.wait_for_everyone()


def _caption(data: CaptionedImages, draw: int) -> str:
    """One of a sample's captions, both as a draw (a large whole number) has it."""
    captions = data.captions(draw % len(data))
    return captions[draw // len(data) % len(captions)]


def _in_parts(numbers: range, size: int) -> list[Sequence[int]]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]
