"""What a folder holds of a cache already, what it lacks, and the table that joins records to the data."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.records import KEY_BYTES, Records, open_shard
from ldm.errors import UserError

NO_KEY = bytes(KEY_BYTES)
"""Of an image that cannot be opened."""
_OURS = re.compile(r"(index|verified)\.json|(images|captions|rows)-[0-9a-f]{64}\.safetensors|\.lock|\..*\.tmp")
_EARLIER = re.compile(r"images-\d{5}\.safetensors|captions\.safetensors")


def caption_key(caption: str) -> bytes:
    """What a caption's record is found by."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()


def content_digest(settings: Sequence[Any], rows: Iterable[Iterable[bytes]]) -> str:
    """sha256 of settings, and of every row's keys in turn."""
    digest = hashlib.sha256("".join(settings_text(setting) for setting in settings).encode())
    for keys in rows:
        digest.update(b"".join(keys))
    return digest.hexdigest()


def settings_text(settings: Any) -> str:
    """Settings as a shard's metadata hold them."""
    return json.dumps(asdict(settings), sort_keys=True)


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where `folder` holds anything but a cache, or one with other settings, by kind, than these."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is already in use: it is a file; choose another")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(_EARLIER.fullmatch(name) for name in names):
        raise UserError(f"output_dir {folder} holds a cache of an earlier format; delete it or choose another")
    if others := [name for name in names if not _OURS.fullmatch(name)]:
        raise UserError(
            f"output_dir {folder} is already in use: {others[0]} is no part of a cache; delete it or choose another"
        )
    for kind, wanted in settings.items():
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            try:
                stored = json.loads(open_shard(path)[1])
            except ValueError:
                continue  # damaged: it will be written anew
            if different := [name for name, value in asdict(wanted).items() if stored.get(name) != value]:
                told = "; ".join(f"{name} {_short(stored.get(name))}, not {_short(asdict(wanted)[name])}"
                                 for name in different)  # fmt: skip
                raise UserError(
                    f"output_dir {folder} holds {kind} cached with another {told}; choose another, or delete that "
                    "folder to encode all anew"
                )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


class Held:
    """The records of one kind in a folder: where each lies, by its key, and the keys of which none could be made."""

    def __init__(self, shards: Sequence[Path]):
        self.places: dict[bytes, tuple[Path, int]] = {}
        self.refused: set[bytes] = set()
        for path in sorted(shards):
            tensors, _ = open_shard(path)
            for place, key in enumerate(tensors["keys"]):
                self.places.setdefault(key.tobytes(), (path, place))
            self.refused |= {key.tobytes() for key in tensors.get("refused", ())}

    def lacking(self, keys: Sequence[bytes], groups: Sequence[int], size: int) -> list[list[int]]:
        """The first place of each key that has no record, in the order of `keys`, in lists of at most `size` of a
        group: the shards to be written. What was encoded before never moves a border of the lists that remain, as long
        as shards were full."""
        pending: dict[int, dict[bytes, int]] = {}
        for place, (key, group) in enumerate(zip(keys, groups, strict=True)):
            if key != NO_KEY and key not in self.places and key not in self.refused:
                pending.setdefault(group, {}).setdefault(key, place)
        lists = [list(pending[group].values()) for group in sorted(pending)]
        return [places[first : first + size] for places in lists for first in range(0, len(places), size)]

    def numbered(self, keys: Sequence[bytes]) -> tuple[list[Path], np.ndarray]:
        """The shards that `keys` need, in the order of their first use, and each key's number in their `Records`."""
        shards = list(dict.fromkeys(self.places[key][0] for key in keys))
        starts = dict(zip(shards, Records(shards).starts.tolist(), strict=False))
        numbers = (starts[path] + place for path, place in (self.places[key] for key in keys))
        return shards, np.fromiter(numbers, np.int64, len(keys))


def embedding_statistics(records: Records, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of image_embeds (n, F, D) over the rows `numbers` of the data and flips, one
    shard in memory at a time."""
    uses = torch.from_numpy(np.bincount(numbers, minlength=len(records)).astype(np.float64))

    def weighted_sum(of: Any) -> Tensor:
        parts = []
        for shard, first in zip(records.shards, records.starts.tolist(), strict=False):
            embeds = torch.tensor(shard["image_embeds"]).double()
            parts.append((uses[first : first + len(embeds), None, None] * of(embeds)).sum(dim=(0, 1)))
        return torch.stack(parts).sum(dim=0)

    count = len(numbers) * records.shards[0]["image_embeds"].shape[1]
    mean = weighted_sum(lambda embeds: embeds) / count
    variance = weighted_sum(lambda embeds: (embeds - mean) ** 2) / max(count - 1, 1)
    return mean.float(), variance.sqrt().clamp(min=1e-6).float()
