"""Which samples a step sees: a pure function of (seed, step), divided among processes and accumulation steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ldm.errors import UserError
from ldm.training.randomness import generator


@dataclass(frozen=True)
class Share:
    """This process's part of every global batch of `batch_size` samples.

    A global batch is cut into accumulation · processes micro-batches; micro-batch number a · processes + rank is
    what process `rank` sees in accumulation step `a`.
    """

    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    rank: int = 0

    def __post_init__(self):
        parts = self.accumulation * self.num_processes
        if self.batch_size % parts:
            raise UserError(
                f"training.batch_size {self.batch_size} is not a multiple of {parts} = "
                f"gradient_accumulation_steps {self.accumulation} × {self.num_processes} processes"
            )

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.accumulation * self.num_processes)

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"accumulation": self.accumulation, "num_processes": self.num_processes}

    def number(self, accumulation_step: int) -> int:
        """Of this process's micro-batch in the global batch."""
        return accumulation_step * self.num_processes + self.rank

    def slice(self, accumulation_step: int) -> slice:
        """Places of this process's micro-batch in the global batch."""
        first = self.number(accumulation_step) * self.micro_batch_size
        return slice(first, first + self.micro_batch_size)


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation (num_samples,) of the sample numbers."""
    return torch.randperm(num_samples, generator=generator(seed, "order", epoch))


def global_batch(step: int, batch_size: int, num_samples: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, sample) of every sample of step `step` (0 is the first). A batch may span the border of two epochs."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [(p // num_samples, int(epoch_order(num_samples, seed, p // num_samples)[p % num_samples])) for p in places]


@lru_cache(maxsize=2)
def epoch_batches(counts: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[tuple[int, torch.Tensor]]:
    """Every batch of an epoch over buckets of `counts` samples: the bucket's number, and places (batch_size,) in it.

    Each bucket is permuted anew and cut into batches; the samples of a bucket that do not fill one are left out of this
    epoch, other ones of the next. So all epochs have as many batches.
    """
    batches = []
    for bucket, count in enumerate(counts):
        order = torch.randperm(count, generator=generator(seed, "order", epoch, bucket))
        batches += [(bucket, part) for part in order.split(batch_size) if len(part) == batch_size]
    order = torch.randperm(len(batches), generator=generator(seed, "order of batches", epoch))
    return [batches[number] for number in order]


def global_bucket_batch(
    step: int, batch_size: int, buckets: Sequence[torch.Tensor], seed: int
) -> list[tuple[int, int]]:
    """(epoch, sample) of every sample of step `step`, all of one of `buckets`, which hold the numbers of samples."""
    counts = tuple(len(samples) for samples in buckets)
    epoch, number = divmod(step, sum(count // batch_size for count in counts))
    bucket, places = epoch_batches(counts, batch_size, seed, epoch)[number]
    return [(epoch, sample) for sample in buckets[bucket][places].tolist()]


def in_order(count: int, size: int, buckets: Sequence[torch.Tensor] | None = None) -> list[list[int]]:
    """The first `count` samples in lists of at most `size`, each of one of `buckets` where there are some."""
    kinds = [range(count)] if buckets is None else [[n for n in samples.tolist() if n < count] for samples in buckets]
    return [list(kind[first : first + size]) for kind in kinds for first in range(0, len(kind), size)]


def never_seen(buckets: Sequence[torch.Tensor], batch_size: int) -> int:
    """Samples in buckets that never fill a batch.

    Raises:
        UserError: no bucket does.
    """
    if all(len(samples) < batch_size for samples in buckets):
        largest = max(len(samples) for samples in buckets)
        raise UserError(
            f"training.batch_size {batch_size}: the largest of {len(buckets)} buckets holds {largest} images; lower it"
        )
    return sum(len(samples) for samples in buckets if len(samples) < batch_size)


class MicroBatches:
    """Batch sampler for a DataLoader: this process's micro-batches from `first_step` up to `last_step`, exclusive. With
    `buckets` every global batch, so every process's part of it, is of one of them."""

    def __init__(
        self,
        num_samples: int,
        share: Share,
        seed: int,
        first_step: int,
        last_step: int,
        buckets: Sequence[torch.Tensor] | None = None,
    ):
        self.num_samples, self.share, self.seed, self.buckets = num_samples, share, seed, buckets
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * self.share.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            if self.buckets is None:
                batch = global_batch(step, self.share.batch_size, self.num_samples, self.seed)
            else:
                batch = global_bucket_batch(step, self.share.batch_size, self.buckets, self.seed)
            for accumulation_step in range(self.share.accumulation):
                yield batch[self.share.slice(accumulation_step)]
