"""Encodes every image and caption once, so that the prior and the U-Net train from what is on disk.

    python train/cache_latents.py --config configs/shapes/cache.yaml [key=value …]

Writes latent means and standard deviations, both flips where the data allow it, and text and image embeddings.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldm import config as configuration
from ldm.clip import export
from ldm.clip.tokenizer import encode
from ldm.config import CacheConfig
from ldm.data.captions import open_images, to_float
from ldm.data.latents import SHARD_SIZE, CacheIndex, weights_digest, write_index
from ldm.errors import RunError, UserError, exit_code_of
from ldm.training import precision, run
from pipelines.arguments import parse_training_arguments


@torch.no_grad()
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(CacheConfig, arguments.config, arguments.overrides)
    folder = Path(config.output_dir)
    run.check_unused(folder, "delete it or choose another")
    vae_folder = run.component_folder(config.autoencoder, "autoencoder", "vae")
    clip_folder = run.component_folder(config.clip, "clip", "text_encoder").parent
    accelerator = Accelerator(mixed_precision=precision.resolve(config.precision))
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(accelerator.device)
    precision.prepare(vae, accelerator.mixed_precision, accelerator.device)
    clip = export.load(clip_folder)
    clip.text_encoder.to(accelerator.device)
    clip.image_encoder.to(accelerator.device)
    data = open_images(config.data, seed=0)
    if clip.image_encoder.config.image_size != config.data.image_size:
        raise UserError(
            f"data.image_size {config.data.image_size}: the image tower of {config.clip} was trained at "
            f"{clip.image_encoder.config.image_size}; set data.image_size to that"
        )
    accelerator.wait_for_everyone()
    folder.mkdir(parents=True, exist_ok=True)

    # Images, one shard after the other, divided among the processes
    shards = list(enumerate(range(0, len(data), SHARD_SIZE)))[accelerator.process_index :: accelerator.num_processes]
    with tqdm(total=len(data), unit=" images", disable=not accelerator.is_main_process) as bar:
        for number, first in shards:
            parts, kept = [], []
            for start in range(first, min(first + SHARD_SIZE, len(data)), config.batch_size):
                indices = range(start, min(start + config.batch_size, first + SHARD_SIZE, len(data)))
                pixels = {index: values for index in indices if (values := data.decoded(index)) is not None}
                if pixels:
                    x = to_float(np.stack(list(pixels.values())))
                    with accelerator.autocast():
                        parts.append(encode_images(vae, clip, x, config.data.horizontal_flip, accelerator.device))
                    check_finite(parts[-1], indices)
                kept += pixels
                bar.update(len(indices) * accelerator.num_processes)
            if not kept:
                continue
            shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            shard["indices"] = torch.tensor(kept)
            save_file(shard, folder / f"images-{number:05d}.safetensors")

    # Captions of the images that were written, each different one once; number 0 is the empty caption
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        kept = []
        for path in sorted(folder.glob("images-*.safetensors")):
            with safe_open(path, "pt") as file:
                kept += file.get_tensor("indices").tolist()
                latent_shape = tuple(file.get_slice("latent_mean").get_shape()[2:])
        numbers = {"": 0}
        choices = [[numbers.setdefault(c, len(numbers)) for c in data.captions(index)] for index in kept]
        texts = list(numbers)
        parts = [encode_captions(clip, texts[i : i + 256], accelerator.device) for i in range(0, len(texts), 256)]
        table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        table["caption_ids"] = torch.tensor(choices, dtype=torch.int32)
        save_file(table, folder / "captions.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        index = CacheIndex(
            num_images=len(kept),
            image_size=config.data.image_size,
            horizontal_flip=config.data.horizontal_flip,
            latent_shape=latent_shape,
            autoencoder=weights_digest(vae_folder),
            text_encoder=weights_digest(clip_folder / "text_encoder"),
            image_encoder=weights_digest(clip_folder / "image_encoder"),
        )
        write_index(folder, index)
        skipped = f", {len(data) - len(kept)} skipped" if len(kept) < len(data) else ""
        print(f"wrote {folder}: {len(kept)} images{skipped}, {len(texts) - 1} different captions")


def encode_images(
    vae: AutoencoderKL, clip: export.ClipTowers, x: torch.Tensor, both_flips: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """latent_mean, latent_std (n, F, C, h, w), times scaling_factor, and image_embeds (n, F, D), of x (n, 3, S, S)."""
    views = torch.stack([x, x.flip(-1)] if both_flips else [x], dim=1).to(device)
    images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(images).latent_dist
    encoded = {
        "latent_mean": (posterior.mean.float() * vae.config.scaling_factor).half(),
        "latent_std": (posterior.std.float() * vae.config.scaling_factor).half(),
        "image_embeds": clip.image_encoder(pixel_values=images).image_embeds.float(),
    }
    return {name: values.unflatten(0, views.shape[:2]).cpu() for name, values in encoded.items()}


def check_finite(encoded: dict[str, torch.Tensor], indices: range) -> None:
    """Raises RunError where an encoder gave what is no number."""
    for name, values in encoded.items():
        if not torch.isfinite(values).all():
            raise RunError(f"{name} of images {indices.start} … {indices.stop - 1} is not finite; set precision=fp32")


def encode_captions(clip: export.ClipTowers, captions: list[str], device: torch.device) -> dict[str, torch.Tensor]:
    """text_embeds (n, D), hidden_states (n, L, D_t) and attention_mask (n, L)."""
    input_ids, attention_mask = encode(clip.tokenizer, captions)
    output = clip.text_encoder(input_ids.to(device))
    return {
        "text_embeds": output.text_embeds.float().cpu(),
        "hidden_states": output.last_hidden_state.half().cpu(),
        "attention_mask": attention_mask.to(torch.uint8),
    }


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
