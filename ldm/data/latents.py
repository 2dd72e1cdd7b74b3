"""The latent cache: what the frozen encoders say of every image and caption, written by cache_latents.py.

    index.json                     how it was made and which files it is made of; written last, so that a cache without
                                   one is not finished
    images-<sha256>.safetensors    records of images, by the sha256 of their bytes: latent_mean, latent_std
                                   (n, F, C, h, w) float16, scaled; image_embeds (n, F, D); sizes (n, 6), see `Pictures`
    captions-<sha256>.safetensors  records of captions, by that of their text: text_embeds (n, D), hidden_states
                                   (n, L, D_t), attention_mask (n, L)
    rows-<sha256>.safetensors      the data in their order, less images that cannot be decoded: images (N,) and captions
                                   (N, K), numbers of records; K captions belong to an image, the canonical one first;
                                   no_caption (1,); embedding_mean, embedding_std (D,)
    verified.json                  size, time and place of files whose sha256 was seen to be that of their names

F is 2 with horizontal flips (as is, mirrored), else 1. All latents of a file are of one shape.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm import files
from ldm.clip.parts import ClipParts
from ldm.components.configs import read_json
from ldm.data.records import Records, is_whole, open_shard
from ldm.errors import UserError
from ldm.training import randomness

FORMAT = 2
LATENTS = ("latent_mean", "latent_std")
TEXT = ("text_embeds", "hidden_states", "attention_mask")
OF_OPENING = {
    "is_local": (True, False),
    "local_files_only": (True, False),
    "pad_to_multiple_of": (None,),
    "pad_token_type_id": (0,),
    "padding_side": ("right",),
    "stride": (0,),
    "truncation_side": ("right",),
    "truncation_strategy": ("longest_first",),
}
"""What a tokenizer adds to its configuration when it is opened and written again, and reads texts as it did before:
keys and their values; also `max_length`, where it is `model_max_length`."""


@dataclass(frozen=True)
class ImageSettings:
    """All that the records of images depend on besides the images. Encoders are named by the sha256 of their weights,
    the autoencoder with what its latents are scaled by."""

    autoencoder: str
    image_encoder: str
    image_size: int
    horizontal_flip: bool
    bucket_sizes: list[list[int]]
    precision: str


@dataclass(frozen=True)
class CaptionSettings:
    """All that the records of captions depend on besides the captions."""

    text_encoder: str
    tokenizer: str


@dataclass(frozen=True)
class CacheIndex:
    """What a cache was made of, and the names of its files."""

    image_settings: ImageSettings
    caption_settings: CaptionSettings
    num_rows: int
    latent_shape: tuple[int, int, int]
    """(C, h, w) of a square image's latents."""
    content: str
    """sha256 of all that training sees: the settings, and every row's image and captions, in order."""
    images: list[str]
    captions: list[str]
    rows: str
    format: int = FORMAT

    @property
    def files(self) -> list[str]:
        return [*self.images, *self.captions, self.rows]


def weights_digest(component: Path) -> str:
    """sha256 of a component folder's weights."""
    digest = hashlib.sha256()
    for path in sorted(component.glob("*.safetensors")):
        digest.update(bytes.fromhex(files.sha256(path)))
    return digest.hexdigest()


def autoencoder_digest(component: Path) -> str:
    """sha256 of an autoencoder's weights and of the factor and shift of its latents."""
    config = component / "config.json"
    stored = json.loads(config.read_text()) if config.is_file() else {}
    scale = [stored.get("scaling_factor"), stored.get("shift_factor")]
    return hashlib.sha256(f"{weights_digest(component)} {scale}".encode()).hexdigest()


def tokenizer_digest(component: Path) -> str:
    """sha256 of a tokenizer folder's files, as they were when the tokenizer was made."""
    digests = {path: files.sha256(path) for path in _tokenizer_files(component)}
    path = component / "tokenizer_config.json"
    if path in digests:
        config = read_json(path)
        usual = OF_OPENING | {"max_length": (config.get("model_max_length"),)}
        config = {key: value for key, value in config.items() if value not in usual.get(key, ())}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        digests[path] = hashlib.sha256(text.encode()).hexdigest()
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


def _digest_as_written(tokenizer: Path) -> str:
    """What earlier caches have for `tokenizer_digest`."""
    return hashlib.sha256("".join(map(files.sha256, _tokenizer_files(tokenizer))).encode()).hexdigest()


def _tokenizer_files(component: Path) -> list[Path]:
    return sorted(component.glob("*.json")) + sorted(component.glob("*.txt"))


def write_index(folder: Path, index: CacheIndex) -> None:
    """Declares a cache finished, its files having been verified as they were written."""
    _remember_verified(folder, index.files)
    files.write_text(folder / "index.json", json.dumps(asdict(index), indent=2))


def read_index(folder: Path) -> CacheIndex:
    """Raises UserError where there is no finished cache of this format."""
    if not folder.is_dir():
        raise UserError(f"cache {folder}: no such folder; write it with train/cache_latents.py")
    try:
        fields = json.loads((folder / "index.json").read_text())
        if fields.get("format") != FORMAT:
            found = fields.get("format", 1)
            raise UserError(
                f"cache {folder} has format {found}, this version reads {FORMAT}; delete it, write it again"
            )
        fields["image_settings"] = ImageSettings(**fields["image_settings"])
        fields["caption_settings"] = CaptionSettings(**fields["caption_settings"])
        return CacheIndex(**{**fields, "latent_shape": tuple(fields["latent_shape"])})
    except FileNotFoundError:
        raise UserError(
            f"cache {folder} is not finished: index.json missing; run train/cache_latents.py again, which goes on"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cache {folder}: index.json is damaged; run train/cache_latents.py again") from None


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raises UserError where a file of a cache is missing or not what was written. A file is read for that only where
    its size, time or place is not what it was when it was last verified."""
    try:
        known = json.loads((folder / "verified.json").read_text())
    except (OSError, ValueError):
        known = {}
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"cache {folder}: {absent[0]} is missing; run train/cache_latents.py again, which mends it")
    changed = [name for name in names if known.get(name) != _stamp(folder / name)]
    with ThreadPoolExecutor(8) as pool:
        for name, whole in zip(changed, pool.map(lambda name: is_whole(folder / name), changed), strict=True):
            if not whole:
                raise UserError(f"cache {folder}: {name} is damaged; run train/cache_latents.py again, which mends it")
    if changed:
        with suppress(OSError):  # a cache may lie where nobody may write: then it is verified every time
            _remember_verified(folder, names)


def _remember_verified(folder: Path, names: Sequence[str]) -> None:
    files.write_text(folder / "verified.json", json.dumps({name: _stamp(folder / name) for name in names}))


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


class CachedLatents(torch.utils.data.Dataset):
    """Samples addressed as (epoch, index), the flip and caption of each a function of (seed, epoch, index).

    A batch is a dict: latent_mean, latent_std (B, C, h, w), image_embeds (B, D), sizes (B, 6), text_embeds (B, D),
    hidden_states (B, L, D_t), all float32, attention_mask (B, L) bool, and indices (B,) int64. Where latents are of
    several shapes, those of a batch must be of one. Nothing is read before it is asked for.
    """

    def __init__(self, folder: Path, seed: int, autoencoder: Path | None, clip: ClipParts):
        """`autoencoder` and `clip` are the component folders of this run, which must be those of the cache, an image
        tower if there is one; without an autoencoder batches are without latents.

        Raises:
            UserError: no finished cache, one of other encoders or another image size, or a file missing or damaged.
        """
        self.folder, self.seed, self.index = folder, seed, read_index(folder)
        check_components(folder, self.index, autoencoder, clip)
        check_files(folder, self.index.files)
        self.fields = ("image_embeds",) if autoencoder is None else (*LATENTS, "image_embeds")
        self.images, self.captions = (
            Records([folder / name for name in names]) for names in (self.index.images, self.index.captions)
        )
        self.rows = open_shard(folder / self.index.rows)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows = open_shard(self.folder / self.index.rows)[0]

    def __len__(self) -> int:
        return self.index.num_rows

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a square image."""
        return self.index.latent_shape

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of every shape that there are latents of."""
        return sorted({shard["latent_mean"].shape[2:] for shard in self.images.shards})

    @property
    def buckets(self) -> list[Tensor] | None:
        """The samples (n,) of each of `latent_shapes`; None where all images are square, or latents are not read."""
        if len(self.index.image_settings.bucket_sizes) == 1 or "latent_mean" not in self.fields:
            return None
        shapes = self.latent_shapes
        of_shard = np.array([shapes.index(shard["latent_mean"].shape[2:]) for shard in self.images.shards])
        of_row = of_shard[np.searchsorted(self.images.starts, self.rows["images"], side="right") - 1]
        return [torch.from_numpy(np.flatnonzero(of_row == number)) for number in range(len(shapes))]

    def text(self, captions: np.ndarray) -> dict[str, Tensor]:
        """text_embeds, hidden_states and attention_mask of the records `captions` (B,)."""
        batch = self.captions.read(TEXT, captions)
        return {
            "text_embeds": batch["text_embeds"].float(),
            "hidden_states": batch["hidden_states"].float(),
            "attention_mask": batch["attention_mask"].bool(),
        }

    def no_text(self) -> dict[str, Tensor]:
        """`text` of the empty caption, B = 1, which stands for none."""
        return self.text(self.rows["no_caption"])

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        draws = [randomness.key(self.seed, "augmentation", epoch, index) for epoch, index in places]
        indices = np.array([index for _, index in places])
        flips = np.array([draw % 2 if self.index.image_settings.horizontal_flip else 0 for draw in draws])
        captions = self.rows["captions"][indices]
        choices = np.array([draw // 2 % captions.shape[1] for draw in draws])
        images = self.rows["images"][indices]
        read = self.images.read(self.fields, images, flips) | self.images.read(("sizes",), images)
        return {
            **{name: values.float() for name, values in read.items()},
            **self.text(captions[np.arange(len(captions)), choices]),
            "indices": torch.from_numpy(indices),
        }

    def embedding_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (D,) of the image embeddings, over images and flips."""
        return tuple(torch.tensor(self.rows[name]) for name in ("embedding_mean", "embedding_std"))


def check_components(folder: Path, index: CacheIndex, autoencoder: Path | None, clip: ClipParts) -> None:
    """Raises UserError where a cache was written with other encoders than these component folders'."""
    stored = asdict(index.image_settings) | asdict(index.caption_settings)
    for name, digests, component in (
        ("autoencoder", (autoencoder_digest,), autoencoder),
        ("text_encoder", (weights_digest,), clip.text_encoder),
        ("image_encoder", (weights_digest,), clip.image_encoder),
        ("tokenizer", (tokenizer_digest, _digest_as_written), clip.tokenizer),
    ):
        if component is not None and stored[name] not in [digest(component) for digest in digests]:
            raise UserError(f"cache {folder} was written with another {name} than {component}; write it again")
