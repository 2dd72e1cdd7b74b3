"""Encodes every image and caption once, so that the prior and the U-Net train from what is on disk.

    python train/cache_latents.py --config configs/shapes/cache.yaml [key=value …]

Writes latent means and standard deviations, both flips where the data allow it, and text and image embeddings. Run it
again, after the data grew, captions changed, or it was interrupted: only what is not there is encoded, and what the
data no longer hold is dropped. Under `accelerate launch` or torchrun the processes divide the work.
"""

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm import configuration
from ldm.clip import export
from ldm.config import CacheConfig, TrainingConfig
from ldm.data import latents
from ldm.data.batches import open_data
from ldm.data.buckets import bucket_sizes
from ldm.data.cache import NO_KEY, Held, caption_key, check_folder, content_digest, embedding_statistics, settings_text
from ldm.data.captions import CaptionedImages, as_is
from ldm.data.decode import open_picture
from ldm.data.encoders import ImageEncoder, as_tensor, check_finite, encode_captions, joined
from ldm.data.latents import CacheIndex, CaptionSettings, ImageSettings
from ldm.data.records import Records, is_whole, write_shard
from ldm.data.shards import Row
from ldm.data.stored import Identities, Pictures, decoded, identified, stacked
from ldm.data.stream import LEAST_READ, CaptionedStream
from ldm.errors import RunError, exit_code_of
from ldm.training import failure, precision, run
from pipelines.arguments import parse_training_arguments

IDENTIFIED, CAPTIONS = 256, 256  # images or captions at a time
NAMED = 20  # skipped images in the last line
WAIT = 86_400  # seconds: a process may have many more images to decode than another


@failure.in_words(less_memory="a smaller batch_size", go_on="what is encoded is kept: run this again, which goes on")
@torch.no_grad()
def main() -> None:
    arguments = parse_training_arguments(__doc__)
    config = configuration.load(CacheConfig, arguments.config, arguments.overrides)
    folder = Path(config.output_dir)
    check_folder(folder, {})
    vae_folder = run.component_folder(config.autoencoder, "autoencoder", "vae")
    clip_parts = run.clip_parts(config.clip, "clip", images=True)
    accelerator = run.join_processes(TrainingConfig(precision=config.precision, timeout_seconds=WAIT), can_shard=False)
    image_settings = ImageSettings(
        autoencoder=latents.autoencoder_digest(vae_folder),
        image_encoder=latents.weights_digest(clip_parts.image_encoder),
        image_size=config.data.image_size,
        horizontal_flip=config.data.horizontal_flip,
        bucket_sizes=[list(size) for size in bucket_sizes(config.data)],
        precision=accelerator.mixed_precision,
    )
    caption_settings = CaptionSettings(
        text_encoder=latents.weights_digest(clip_parts.text_encoder),
        tokenizer=latents.tokenizer_digest(clip_parts.tokenizer),
    )
    check_folder(folder, {"images": image_settings, "captions": caption_settings})
    data = open_data(config.data, 0, accelerator.num_processes)
    accelerator.wait_for_everyone()  # before the folder exists, all have checked it
    if accelerator.is_main_process:
        claim(folder)
    accelerator.wait_for_everyone()
    vae = AutoencoderKL.from_pretrained(vae_folder).eval().to(accelerator.device)
    precision.prepare(vae, accelerator.mixed_precision, accelerator.device)
    clip = export.load(clip_parts)
    clip.text_encoder.to(accelerator.device)
    clip.image_encoder.to(accelerator.device)

    # Images: what they are, which of them are there already, and records of the others
    images_before = Held(whole_shards(accelerator, folder, "images"))
    encoder = ImageEncoder(vae, clip, config, accelerator.autocast, settings_text(image_settings))
    if isinstance(data, CaptionedStream):
        keys, captions_of = write_streamed_images(accelerator, data, encoder, images_before)
    else:
        keys, buckets = identities(accelerator, data, config)
        write_images(accelerator, data, encoder, images_before.lacking(keys, buckets, config.shard_size), keys, buckets)
        captions_of = data.captions
    accelerator.wait_for_everyone()
    images = Held(sorted(folder.glob("images-*.safetensors")))
    kept = [row for row, key in enumerate(keys) if key in images.places]
    skipped = [row for row, key in enumerate(keys) if key not in images.places]
    check_readable(data, len(keys), len(skipped))

    # Captions of those images, each different one once, and the empty one, which stands for none
    numbers = {"": 0}
    choices = [[numbers.setdefault(caption, len(numbers)) for caption in captions_of(row)] for row in kept]
    most = max(map(len, choices), default=0)  # those of a row with fewer come again, in turn
    choices = [[of_row[place % len(of_row)] for place in range(most)] for of_row in choices]
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
        row_keys = ([keys[row], *(caption_keys[n] for n in of_row)] for row, of_row in zip(kept, choices, strict=True))
        index = CacheIndex(
            image_settings=image_settings,
            caption_settings=caption_settings,
            num_rows=len(kept),
            latent_shape=square_shape(records, config.data.image_size),
            content=content_digest((image_settings, caption_settings), row_keys),
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
    run.lock(folder, "written")
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
            skip(data, batch["faults"].values(), bad)
            bar.update(len(batch["keys"]) * accelerator.num_processes)
    keys, buckets = (from_all(accelerator, torch.cat(part), len(data)) for part in zip(*parts, strict=True))
    return [key.tobytes() for key in keys.numpy()], buckets.tolist()


def write_images(
    accelerator: Accelerator,
    data: CaptionedImages,
    encoder: ImageEncoder,
    shards: list[list[int]],
    keys: list[bytes],
    buckets: list[int],
) -> None:
    """Encodes the rows in `shards`, of which this process takes its share, and writes each list as one shard."""
    config = encoder.config
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    places = [[(row, buckets[row]) for row in rows] for shard in mine for rows in in_parts(shard, config.batch_size)]
    batches = iter(load(Pictures(data, bucket_sizes(config.data)), places, config))
    bad = keys.count(NO_KEY)
    with progress(accelerator, sum(map(len, shards)), "encoding images") as bar:
        for shard in mine:
            refused = []
            for rows in in_parts(shard, config.batch_size):
                batch = next(batches)
                bad += len(batch["faults"])
                skip(data, batch["faults"].values(), bad)
                refused += [keys[row] for row in batch["faults"]]
                if kept := batch["rows"]:
                    names = [f"image {row} of {config.data.source}" for row in kept]
                    encoder.add(batch, [keys[row] for row in kept], names)
                bar.update(len(rows) * accelerator.num_processes)
            encoder.finish_shard(refused)


def write_streamed_images(
    accelerator: Accelerator, data: CaptionedStream, encoder: ImageEncoder, held: Held
) -> tuple[list[bytes], Callable[[int], list[str]]]:
    """Encodes what `held` lacks while each process reads its own shards of the data, once. The keys of all rows, in the
    order of the data, and what gives a row's captions."""
    config, sizes = encoder.config, bucket_sizes(encoder.config.data)
    encoders, waiting = [replace(encoder, parts=[], keys=[]) for _ in sizes], [[] for _ in sizes]
    seen, rows, bad = {*held.places, *held.refused}, [], 0

    def look(row: Row) -> tuple[bytes, int, dict[str, np.ndarray] | None]:
        """A row's key, its bucket, and its pixels where they are wanted."""
        try:
            if row.fault:
                raise ValueError(row.fault)
            key, bucket = identified(open_picture(row.picture), sizes)
            wanted = key not in seen
            return key, bucket, decoded(open_picture(row.picture), sizes[bucket], sizes[0][0]) if wanted else None
        except Exception as error:  # damaged files make decoders raise anything
            tqdm.write(f"warning: {row.name} cannot be used: {error}; skipped", file=sys.stderr)
            return NO_KEY, 0, None

    def encode_waiting(bucket: int) -> None:
        if waiting[bucket]:
            keys, names, pictures = (list(part) for part in zip(*waiting[bucket], strict=True))
            encoders[bucket].add(stacked(pictures), keys, names)
            waiting[bucket].clear()

    stored = data.stored(accelerator.process_index)
    with ThreadPoolExecutor(max(1, config.data.num_workers)) as pool, progress(accelerator, None, "images") as bar:
        while group := list(itertools.islice(stored, config.batch_size)):
            looks = pool.map(look, [row for _, row in group])
            for (shard, row), (key, bucket, picture) in zip(group, looks, strict=True):
                rows.append((shard, key, row.captions))
                bad += key == NO_KEY
                if picture is None or key in seen:
                    continue
                seen.add(key)
                waiting[bucket].append((key, row.name, picture))
                missing = config.shard_size - len(encoders[bucket].keys) - len(waiting[bucket])
                if len(waiting[bucket]) == config.batch_size or not missing:
                    encode_waiting(bucket)
                if not missing:
                    encoders[bucket].finish_shard()
            data.check_bad(len(rows), bad, LEAST_READ)
            bar.update(len(group) * accelerator.num_processes)
    for bucket in range(len(sizes)):
        encode_waiting(bucket)
        if encoders[bucket].keys:
            encoders[bucket].finish_shard()
    rows = sorted(gather_object(rows), key=lambda row: row[0])  # each process has whole shards, in their order
    return [key for _, key, _ in rows], [captions for _, _, captions in rows].__getitem__


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
            write_shard(
                folder, "captions", joined(parts) | {"keys": as_tensor([keys[place] for place in shard])}, settings
            )


def skip(data: CaptionedImages, faults: Collection[str], bad: int) -> None:
    """Tells of images that cannot be decoded. Raises RunError where they are too many."""
    for fault in faults:
        tqdm.write(f"warning: {fault}; skipped", file=sys.stderr)
    if faults:
        data.check_readable(bad)


def check_readable(data: CaptionedImages | CaptionedStream, count: int, bad: int) -> None:
    """Raises RunError where there are no images, or too many that cannot be decoded."""
    if not count:
        raise RunError(f"data.source {data.config.source} holds no images")
    if isinstance(data, CaptionedStream):
        data.check_bad(count, bad, 1)
    else:
        data.check_readable(bad)


def square_shape(records: Records, image_size: int) -> tuple[int, int, int]:
    """(C, h, w) of a square image's latents, though there may be none of that shape."""
    channels, height, _ = records.shards[0]["latent_mean"].shape[2:]
    factor = int(records.shards[0]["sizes"][0, 4]) // height
    return channels, image_size // factor, image_size // factor


def load(dataset: Dataset, batches: Sequence[Sequence], config: CacheConfig) -> DataLoader:
    return DataLoader(dataset, batch_sampler=batches, num_workers=config.data.num_workers, collate_fn=as_is)


def progress(accelerator: Accelerator, total: int | None, doing: str) -> tqdm:
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
