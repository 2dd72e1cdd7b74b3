"""From pictures and captions to the records of a cache, by the frozen encoders."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ldm.clip.export import ClipTowers
from ldm.clip.tokenizer import encode
from ldm.config import CacheConfig
from ldm.data.captions import to_float
from ldm.data.records import KEY_BYTES, write_shard
from ldm.errors import RunError


@dataclass
class ImageEncoder:
    """Both encoders of images, and the shard that is being filled."""

    vae: AutoencoderKL
    clip: ClipTowers
    config: CacheConfig
    autocast: Callable[[], AbstractContextManager]
    settings: str
    """What the shards' metadata say."""
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    def add(self, batch: dict[str, Tensor], keys: list[bytes], names: list[str]) -> None:
        """Encodes a batch of `stored.stacked`. Raises RunError where that gives what is no number, naming the image."""
        with self.autocast():
            part = encode_images(self.vae, self.clip, batch, self.config.data.horizontal_flip)
        check_finite(part, names)
        self.parts.append({**part, "sizes": batch["sizes"]})
        self.keys += keys

    def finish_shard(self, refused: Sequence[bytes] = ()) -> None:
        """Writes what was added; `refused` are keys of images that cannot be decoded."""
        fields = joined(self.parts) | {"keys": as_tensor(self.keys), "refused": as_tensor(refused)}
        write_shard(Path(self.config.output_dir), "images", fields, self.settings)
        self.parts, self.keys = [], []


def encode_images(
    vae: AutoencoderKL, clip: ClipTowers, batch: dict[str, Tensor], both_flips: bool
) -> dict[str, Tensor]:
    """latent_mean, latent_std (n, F, C, h, w), times scaling_factor, of a batch's images, and image_embeds (n, F, D) of
    its squares."""

    def views(pixels: Tensor) -> Tensor:
        x = to_float(pixels.numpy())
        x = torch.stack([x, x.flip(-1)] if both_flips else [x], dim=1).to(vae.device)
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)

    squares = views(batch["squares"])
    images = squares if batch["images"] is batch["squares"] else views(batch["images"])
    posterior = vae.encode(images).latent_dist
    encoded = {
        "latent_mean": (posterior.mean.float() * vae.config.scaling_factor).half(),
        "latent_std": (posterior.std.float() * vae.config.scaling_factor).half(),
        "image_embeds": clip.image_embeds(squares).float(),
    }
    return {name: values.unflatten(0, (len(batch["sizes"]), -1)).cpu() for name, values in encoded.items()}


def encode_captions(clip: ClipTowers, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    """text_embeds (n, D), hidden_states (n, L, D_t) and attention_mask (n, L)."""
    input_ids, attention_mask = encode(clip.tokenizer, captions)
    output = clip.text_encoder(input_ids.to(device))
    return {
        "text_embeds": output.text_embeds.float().cpu(),
        "hidden_states": output.last_hidden_state.half().cpu(),
        "attention_mask": attention_mask.to(torch.uint8),
    }


def check_finite(encoded: dict[str, Tensor], names: list[str]) -> None:
    """Raises RunError where an encoder gave what is no number, naming the first it was given that for."""
    for name, values in encoded.items():
        good = torch.isfinite(values).flatten(1).all(dim=1)
        if not good.all():
            raise RunError(f"{name} of {names[int((~good).nonzero()[0])]} is not finite; set precision=fp32")


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def as_tensor(keys: Sequence[bytes]) -> Tensor:
    """Keys as (n, 32) uint8."""
    return torch.tensor([list(key) for key in keys], dtype=torch.uint8).view(-1, KEY_BYTES)
