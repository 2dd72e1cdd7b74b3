"""Encodes every image and caption once, so that the prior and the U-Net train from what is on disk.

    python train/cache_latents.py --config configs/shapes/cache.yaml [key=value …]

Writes latent means and standard deviations, both flips where the data allow it, and text and image embeddings. Run it
again, after the data grew, captions changed, or it was interrupted: only what is not there is encoded, and what the
data no longer hold is dropped. Under `accelerate launch` or torchrun the processes divide the work.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig

from ldm import config as configuration
from ldm.clip import export
from ldm.clip.tokenizer import encode
from ldm.config import CacheConfig
from ldm.data import latents
from ldm.data.buckets import bucket_sizes
from ldm.data.cache import NO_KEY, Held, caption_key, check_folder, embedding_statistics, settings_text
from ldm.data.captions import CaptionedImages, as_is, open_images, to_float
from ldm.data.latents import CacheIndex, CaptionSettings, ImageSettings
from ldm.data.records import Records, is_whole, write_shard
from ldm.data.stored import Identities, Pictures
from ldm.errors import RunError, UserError, exit_code_of
from ldm.training import precision, run
from pipelines.arguments import parse_training_arguments

IDENTIFIED, CAPTIONS = 256, 256  # images or captions at a time
NAMED = 20  # skipped images in the last line


@torch.no_grad()
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(CacheConfig, arguments.config, arguments.overrides)
    folder = Path(config.output_dir)
    check_folder(folder, {})
    vae_folder = run.component_folder(config.autoencoder, "autoencoder", "vae")
    clip_folder = run.component_folder(config.clip, "clip", "text_encoder").parent
    accelerator = Accelerator(mixed_precision=precision.resolve(config.precision))
    image_size = CLIPVisionConfig.from_pretrained(clip_folder / "image_encoder").image_size
    if image_size != config.data.image_size:
        raise UserError(
            f"data.image_size {config.data.image_size}: the image tower of {config.clip} was trained at {image_size}; "
            "set data.image_size to that"
        )
    image_settings = ImageSettings(
        autoencoder=latents.autoencoder_digest(vae_folder),
        image_encoder=latents.weights_digest(clip_folder / "image_encoder"),
        image_size=config.data.image_size,
        horizontal_flip=config.data.horizontal_flip,
        bucket_sizes=[list(size) for size in bucket_sizes(config.data)],
        precision=accelerator.mixed_precision,
    )
    caption_settings = CaptionSettings(
        text_encoder=latents.weights_digest(clip_folder / "text_encoder"),
        tokenizer=latents.tokenizer_digest(clip_folder / "tokenizer"),
    )
    check_folder(folder, {"images": image_settings, "captions": caption_settings})
    data = open_images(config.data, seed=0)
    accelerator.wait_for_everyone()  # before the folder exists, all have checked it
    if accelerator.is_main_process:
        claim(folder)
    accelerator.wait_for_everyone()
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(accelerator.device)
    precision.prepare(vae, accelerator.mixed_precision, accelerator.device)
    clip = export.load(clip_folder)
    clip.text_encoder.to(accelerator.device)
    clip.image_encoder.to(accelerator.device)

    # Images: what they are, which of them are there already, and records of the others
    images_before = Held(whole_shards(accelerator, folder, "images"))
    keys, buckets = identities(accelerator, data, config)
    shards = images_before.lacking(keys, buckets, config.shard_size)
    write_images(accelerator, vae, clip, data, config, shards, keys, buckets, settings_text(image_settings))
    accelerator.wait_for_everyone()
    images = Held(sorted(folder.glob("images-*.safetensors")))
    kept = [row for row, key in enumerate(keys) if key in images.places]
    skipped = [row for row, key in enumerate(keys) if key not in images.places]
    data.check_readable(len(skipped))

    # Captions of those images, each different one once, and the empty one, which stands for none
    numbers = {"": 0}
    choices = [[numbers.setdefault(caption, len(numbers)) for caption in data.captions(row)] for row in kept]
    texts = list(numbers)
    caption_keys = [caption_key(text) for text in texts]
    captions_before = Held(whole_shards(accelerator, folder, "captions"))
    shards = captions_before.lacking(caption_keys, [0] * len(texts), config.shard_size)
    write_captions(accelerator, clip, folder, shards, texts, caption_keys, settings_text(caption_settings))
    accelerator.wait_for_everyone()

    # The table that joins them to the data, and the index; then what nothing refers to any more is dropped
    if accelerator.is_main_process:
        image_shards, image_numbers = images.numbered([keys[row] for row in kept])
        captions = Held(sorted(folder.glob("captions-*.safetensors")))
        caption_shards, caption_numbers = captions.numbered(caption_keys)
        records = Records(image_shards)
        mean, std = embedding_statistics(records, image_numbers)
        rows = {
            "images": torch.from_numpy(image_numbers),
            "captions": torch.from_numpy(caption_numbers[np.array(choices)]),
            "no_caption": torch.from_numpy(caption_numbers[:1].copy()),
            "embedding_mean": mean,
            "embedding_std": std,
        }
        index = CacheIndex(
            image_settings=image_settings,
            caption_settings=caption_settings,
            num_rows=len(kept),
            latent_shape=square_shape(records, config.data.image_size),
            images=[path.name for path in image_shards],
            captions=[path.name for path in caption_shards],
            rows=write_shard(folder, "rows", rows).name,
        )
        latents.write_index(folder, index)
        for path in folder.glob("*.safetensors"):
            if path.name not in index.files:
                path.unlink()
        different = {keys[row] for row in kept}
        print(
            f"wrote {folder}: {len(kept)} images ({told(different, images_before)}, {len(kept) - len(different)} "
            f"duplicates), {len(skipped)} skipped{named(skipped)}, {len(texts) - 1} different captions "
            f"({told(caption_keys[1:], captions_before)})"
        )
    accelerator.end_training()


def claim(folder: Path) -> None:
    """Makes the folder this process's own, and clears it of files that a killed run left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.lock(folder, "written")
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    for path in folder.glob(".*.tmp"):
        path.unlink()


def whole_shards(accelerator: Accelerator, folder: Path, kind: str) -> list[Path]:
    """The shards of a kind that are what their names say; the others are told of and deleted, to be written anew."""
    paths = sorted(folder.glob(f"{kind}-*.safetensors"))
    mine = paths[accelerator.process_index :: accelerator.num_processes]
    found = from_all(accelerator, torch.tensor([is_whole(path) for path in mine], dtype=torch.uint8), len(paths))
    for path, whole in zip(paths, found.tolist(), strict=True):
        if not whole and accelerator.is_main_process:
            tqdm.write(f"warning: {path} is damaged; encoding its {kind} again", file=sys.stderr)
            path.unlink()
    accelerator.wait_for_everyone()
    return [path for path, whole in zip(paths, found.tolist(), strict=True) if whole]


def identities(accelerator: Accelerator, data: CaptionedImages, config: CacheConfig) -> tuple[list[bytes], list[int]]:
    """Every row's key and number of its bucket, of which each process finds its share."""
    rows = range(accelerator.process_index, len(data), accelerator.num_processes)
    parts = [(torch.zeros(0, len(NO_KEY), dtype=torch.uint8), torch.zeros(0, dtype=torch.long))]
    bad = 0
    with progress(accelerator, len(data), "looking at images") as bar:
        for batch in load(Identities(data, bucket_sizes(config.data)), in_parts(rows, IDENTIFIED), config):
            parts.append((batch["keys"], batch["buckets"]))
            bad += len(batch["faults"])
            skip(data, batch["faults"], bad)
            bar.update(len(batch["keys"]) * accelerator.num_processes)
    keys, buckets = (from_all(accelerator, torch.cat(part), len(data)) for part in zip(*parts, strict=True))
    return [key.tobytes() for key in keys.numpy()], buckets.tolist()


def write_images(
    accelerator: Accelerator,
    vae: AutoencoderKL,
    clip: export.ClipTowers,
    data: CaptionedImages,
    config: CacheConfig,
    shards: list[list[int]],
    keys: list[bytes],
    buckets: list[int],
    settings: str,
) -> None:
    """Encodes the rows in `shards`, of which this process takes its share, and writes each list as one shard."""
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    places = [[(row, buckets[row]) for row in rows] for shard in mine for rows in in_parts(shard, config.batch_size)]
    batches = iter(load(Pictures(data, bucket_sizes(config.data)), places, config))
    bad = keys.count(NO_KEY)
    with progress(accelerator, sum(map(len, shards)), "encoding images") as bar:
        for shard in mine:
            parts, kept, refused = [], [], []
            for rows in in_parts(shard, config.batch_size):
                batch = next(batches)
                bad += len(batch["faults"])
                skip(data, batch["faults"], bad)
                refused += batch["faults"]
                kept += batch["rows"]
                if batch["rows"]:
                    with accelerator.autocast():
                        part = encode_images(vae, clip, batch, config.data.horizontal_flip, accelerator.device)
                    check_finite(part, [f"image {row} of {config.data.source}" for row in batch["rows"]])
                    parts.append({**part, "sizes": batch["sizes"]})
                bar.update(len(rows) * accelerator.num_processes)
            fields = joined(parts) | {"keys": as_tensor(keys, kept), "refused": as_tensor(keys, refused)}
            write_shard(Path(config.output_dir), "images", fields, settings)


def write_captions(
    accelerator: Accelerator,
    clip: export.ClipTowers,
    folder: Path,
    shards: list[list[int]],
    texts: list[str],
    keys: list[bytes],
    settings: str,
) -> None:
    """As `write_images`, of texts."""
    with progress(accelerator, sum(map(len, shards)), "encoding captions") as bar:
        for shard in shards[accelerator.process_index :: accelerator.num_processes]:
            parts = []
            for places in in_parts(shard, CAPTIONS):
                parts.append(encode_captions(clip, [texts[place] for place in places], accelerator.device))
                check_finite(parts[-1], [f"caption {texts[place]!r}" for place in places])
                bar.update(len(places) * accelerator.num_processes)
            write_shard(folder, "captions", joined(parts) | {"keys": as_tensor(keys, shard)}, settings)


def encode_images(
    vae: AutoencoderKL, clip: export.ClipTowers, batch: dict[str, Any], both_flips: bool, device: torch.device
) -> dict[str, Tensor]:
    """latent_mean, latent_std (n, F, C, h, w), times scaling_factor, of a batch's images, and image_embeds (n, F, D) of
    its squares."""

    def views(pixels: Tensor) -> Tensor:
        x = to_float(pixels.numpy())
        x = torch.stack([x, x.flip(-1)] if both_flips else [x], dim=1).to(device)
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)

    squares = views(batch["squares"])
    images = squares if batch["images"] is batch["squares"] else views(batch["images"])
    posterior = vae.encode(images).latent_dist
    encoded = {
        "latent_mean": (posterior.mean.float() * vae.config.scaling_factor).half(),
        "latent_std": (posterior.std.float() * vae.config.scaling_factor).half(),
        "image_embeds": clip.image_encoder(pixel_values=squares).image_embeds.float(),
    }
    return {name: values.unflatten(0, (len(batch["rows"]), -1)).cpu() for name, values in encoded.items()}


def encode_captions(clip: export.ClipTowers, captions: list[str], device: torch.device) -> dict[str, Tensor]:
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
    for field, values in encoded.items():
        good = torch.isfinite(values).flatten(1).all(dim=1)
        if not good.all():
            raise RunError(f"{field} of {names[int((~good).nonzero()[0])]} is not finite; set precision=fp32")


def skip(data: CaptionedImages, faults: dict[int, str], bad: int) -> None:
    """Tells of images that cannot be decoded. Raises RunError where they are too many."""
    for fault in faults.values():
        tqdm.write(f"warning: {fault}; skipped", file=sys.stderr)
    if faults:
        data.check_readable(bad)


def square_shape(records: Records, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of a square image's latents, though there may be none of that shape."""
    channels, height, _ = records.shards[0]["latent_mean"].shape[2:]
    factor = int(records.shards[0]["sizes"][0, 4]) // height
    return channels, image_size // factor, image_size // factor


def load(dataset: Dataset, batches: Sequence[Sequence], config: CacheConfig) -> DataLoader:
    return DataLoader(dataset, batch_sampler=batches, num_workers=config.data.num_workers, collate_fn=as_is)


def progress(accelerator: Accelerator, total: int, doing: str) -> tqdm:
    return tqdm(total=total, desc=doing, unit="", dynamic_ncols=True, disable=not accelerator.is_main_process)


def from_all(accelerator: Accelerator, part: Tensor, count: int) -> Tensor:
    """(count, …) of all processes, each of which has every num_processes-th from its own number on."""
    longest = -(-count // accelerator.num_processes)
    padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    gathered = accelerator.gather(padded.to(accelerator.device)).cpu() if count else padded
    return gathered.unflatten(0, (accelerator.num_processes, longest)).transpose(0, 1).flatten(0, 1)[:count]


def in_parts(items: Sequence, size: int) -> list[Sequence]:
    """Consecutive parts of at most `size`."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def as_tensor(keys: list[bytes], places: Iterable[int]) -> Tensor:
    """Keys as (n, 32) uint8."""
    return torch.tensor([list(keys[place]) for place in places], dtype=torch.uint8).view(-1, len(NO_KEY))


def told(keys: Iterable[bytes], before: Held) -> str:
    keys = set(keys)
    reused = sum(key in before.places for key in keys)
    return f"{len(keys) - reused} encoded, {reused} reused"


def named(rows: list[int]) -> str:
    if not rows:
        return ""
    return f" (image {', '.join(map(str, rows[:NAMED]))}{' …' if len(rows) > NAMED else ''})"


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
