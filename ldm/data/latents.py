"""The latent cache: what the frozen encoders say of every image and caption, written once by cache_latents.py.

    index.json                what it was made of; written last, so a cache without one is not finished
    images-00000.safetensors  latent_mean, latent_std (n, F, C, h, w) float16, scaled; image_embeds (n, F, D); indices
                              (n,), the places in the data: images that cannot be decoded are left out
    captions.safetensors      text_embeds (U, D), hidden_states (U, L, D_t), attention_mask (U, L), caption_ids (N, K)

F is 2 with horizontal flips (as is, mirrored), else 1. U counts different captions; number 0 is the empty one, which
stands for no caption. K captions belong to each image, the canonical one first.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.errors import UserError
from ldm.training import randomness

SHARD_SIZE = 4096


@dataclass(frozen=True)
class CacheIndex:
    """What a cache was made of. Encoders are named by the sha256 of their weights."""

    num_images: int
    image_size: int
    horizontal_flip: bool
    latent_shape: tuple[int, int, int]
    autoencoder: str
    text_encoder: str
    image_encoder: str


def weights_digest(component: Path) -> str:
    """sha256 of a component folder's weights."""
    digest = hashlib.sha256()
    for path in sorted(component.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_index(folder: Path, index: CacheIndex) -> None:
    """Declares a cache finished."""
    temporary = folder / "index.json.tmp"
    temporary.write_text(json.dumps(asdict(index), indent=2))
    temporary.rename(folder / "index.json")


def read_index(folder: Path) -> CacheIndex:
    """Raises UserError where there is no finished cache."""
    if not folder.is_dir():
        raise UserError(f"cache {folder}: no such folder; write it with train/cache_latents.py")
    try:
        fields = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise UserError(f"cache {folder} is not finished: index.json missing; write it again") from None
    return CacheIndex(**{**fields, "latent_shape": tuple(fields["latent_shape"])})


class CachedLatents(torch.utils.data.Dataset):
    """Samples addressed as (epoch, index), the flip and caption of each a function of (seed, epoch, index).

    A batch is a dict: latent_mean, latent_std (B, C, h, w), image_embeds (B, D), text_embeds (B, D), hidden_states
    (B, L, D_t), all float32, and attention_mask (B, L) bool.
    """

    def __init__(self, folder: Path, seed: int, autoencoder: Path | None, clip: Path):
        """`autoencoder` and `clip` are the component folders of this run, which must be those of the cache.

        Raises:
            UserError: no finished cache, or one of other encoders.
        """
        self.index, self.seed = read_index(folder), seed
        for name, component in (
            ("autoencoder", autoencoder),
            ("text_encoder", clip / "text_encoder"),
            ("image_encoder", clip / "image_encoder"),
        ):
            if component is not None and weights_digest(component) != getattr(self.index, name):
                raise UserError(f"cache {folder} was written with another {name} than {component}; write it again")
        shards = [load_file(path) for path in sorted(folder.glob("images-*.safetensors"))]
        self.latent_mean = torch.cat([shard["latent_mean"] for shard in shards])
        self.latent_std = torch.cat([shard["latent_std"] for shard in shards])
        self.image_embeds = torch.cat([shard["image_embeds"] for shard in shards])
        if len(self.latent_mean) != self.index.num_images:
            raise UserError(
                f"cache {folder} is damaged: {self.index.num_images} images promised, {len(self.latent_mean)} there"
            )
        self.captions = load_file(folder / "captions.safetensors")
        self.caption_ids = self.captions.pop("caption_ids")

    def __len__(self) -> int:
        return self.index.num_images

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.index.latent_shape

    def text(self, caption_ids: Tensor) -> dict[str, Tensor]:
        """text_embeds, hidden_states and attention_mask of captions (B,) by number; 0 is the empty caption."""
        batch = {name: values[caption_ids] for name, values in self.captions.items()}
        return {
            "text_embeds": batch["text_embeds"].float(),
            "hidden_states": batch["hidden_states"].float(),
            "attention_mask": batch["attention_mask"].bool(),
        }

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        draws = [randomness.key(self.seed, "augmentation", epoch, index) for epoch, index in places]
        indices = torch.tensor([index for _, index in places])
        flips = torch.tensor([draw % 2 if self.index.horizontal_flip else 0 for draw in draws])
        choices = torch.tensor([draw // 2 % self.caption_ids.shape[1] for draw in draws])
        return {
            "latent_mean": self.latent_mean[indices, flips].float(),
            "latent_std": self.latent_std[indices, flips].float(),
            "image_embeds": self.image_embeds[indices, flips].float(),
            **self.text(self.caption_ids[indices, choices]),
        }

    def embedding_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (D,) of the image embeddings, over images and flips."""
        embeds = self.image_embeds.flatten(0, 1).double()
        return embeds.mean(dim=0).float(), embeds.std(dim=0).clamp(min=1e-6).float()
