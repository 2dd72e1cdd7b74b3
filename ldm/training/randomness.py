"""Keyed randomness: every draw is a pure function of (seed, purpose, keys), never of what was drawn before.

So a resumed run equals an uninterrupted one, with any number of data workers, and any division of a batch among
processes and accumulation steps sees the same noise.
"""

import hashlib

import torch


def key(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit number that depends on all of its arguments: the seed of one stream of random numbers."""
    text = "/".join(str(part) for part in (seed, purpose, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A fresh generator for one draw. It lives on the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(key(seed, purpose, *keys))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Fixes what only the global generators can: dropout inside the networks, in this step and micro-batch. Its number
    in the global batch (`Share.number`) tells it from those of other processes and accumulation steps."""
    torch.manual_seed(key(seed, "dropout", step, micro_batch))
