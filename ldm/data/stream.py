"""Captioned images that are read from one end to the other, shard by shard: exact to resume, whatever their number.

The shards number r, r + W, … belong to process r of W, for good. In every epoch it reads them in an order drawn from
(seed, epoch), in blocks of `data.shuffle_buffer` samples, and each block in an order drawn from (seed, epoch, its first
sample). So a place in the stream is a few numbers, a `Position`, and to go on from it costs the reading of a part of
one shard and of one block.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.config import DataConfig
from ldm.data.captions import CaptionedImages, to_float
from ldm.data.decode import open_picture, to_square
from ldm.data.order import Share
from ldm.data.shards import Row, Shards
from ldm.errors import RunError, UserError
from ldm.training import randomness

LEAST_READ = 100  # images read before their bad fraction can stop a run in the middle of an epoch
WAITS = (1, 5, 20, 60)  # seconds before a shard is opened again whose reading failed


@dataclass(frozen=True)
class Position:
    """Where a process is: in `epoch`, in the block that begins at `row` of the shard in place `shard` of the epoch's
    order, of which `taken` samples are behind it. It has read `num_read` samples in all, `num_bad` of them bad."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0
    num_read: int = 0
    num_bad: int = 0


@dataclass(frozen=True)
class Place:
    """Of one sample: row number `row` of shard number `shard`, which has place `order` in the order of `epoch`."""

    epoch: int
    order: int
    shard: int
    row: int


class CaptionedStream:
    """What `CaptionedImages` is for streams: samples come in an order of their own, and none can be asked for."""

    def __init__(self, config: DataConfig, seed: int, shards: Shards, num_processes: int):
        """Raises UserError where there are too few shards for all processes."""
        if shards.count < num_processes:
            raise UserError(
                f"data.source {config.source}: {shards.count} shards are too few for {num_processes} processes, each "
                "of which reads its own; write more shards, or start fewer processes"
            )
        self.config, self.seed, self.shards, self.num_processes = config, seed, shards, num_processes
        self._excerpts: dict[int, CaptionedImages] = {}
        self._told: set[str] = set()

    def own_shards(self, rank: int) -> range:
        """Numbers of the shards that process `rank` reads."""
        return range(rank, self.shards.count, self.num_processes)

    def in_order(self, rank: int) -> Iterator[tuple[str, np.ndarray, list[str]]]:
        """Name, pixels uint8 (3, S, S), not flipped, and captions of every sample of a process's shards, once, in the
        order they are stored in; those that cannot be used are told on standard error and left out."""
        num_read = num_bad = 0
        for _, row in self.stored(rank):
            pixels = self.decoded(row)
            num_read, num_bad = num_read + 1, num_bad + (pixels is None)
            self.check_bad(num_read, num_bad, LEAST_READ)
            if pixels is not None:
                yield row.name, pixels, row.captions
        self.check_bad(num_read, num_bad, 1)

    def stored(self, rank: int) -> Iterator[tuple[int, Row]]:
        """The shard's number and the sample as it is stored, of every sample of a process's shards, once."""
        for shard in self.own_shards(rank):
            for row in self._patient_rows(shard, 0, pictures=True):
                yield shard, row

    def excerpt(self, count: int) -> CaptionedImages:
        """The first `count` samples of process 0 that can be used, in memory, for what needs some in any order."""
        if count not in self._excerpts:
            found = list(itertools.islice(self.in_order(0), count))
            if not found:
                raise RunError(f"data.source {self.config.source} holds no samples")
            self._excerpts[count] = CaptionedImages(
                replace(self.config, streaming=False),
                self.seed,
                lambda index: Image.fromarray(found[index][1].transpose(1, 2, 0)),
                lambda index: found[index][2],
                len(found),
            )
        return self._excerpts[count]

    def some_captions(self, count: int) -> Iterator[str]:
        """Captions of the first `count` samples."""
        rows = (row for shard in range(self.shards.count) for row in self._patient_rows(shard, 0, pictures=False))
        for row in itertools.islice(rows, count):
            yield from row.captions

    def decoded(self, row: Row) -> np.ndarray | None:
        """A row's pixels, uint8 (3, S, S), or None where it has none, which is told on standard error once."""
        try:
            if row.fault:
                raise ValueError(row.fault)
            image = to_square(open_picture(row.picture), self.config.image_size)
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        except Exception as error:  # damaged files make decoders raise anything
            if row.name not in self._told:
                tqdm.write(f"warning: {row.name} cannot be used: {error}; skipped", file=sys.stderr)
            self._told.add(row.name)
            return None

    def check_bad(self, num_read: int, num_bad: int, least_read: int) -> None:
        """Raises RunError where more than data.max_bad_fraction of at least `least_read` images, or all, are bad."""
        allowed = self.config.max_bad_fraction
        if num_read >= least_read and (num_bad > allowed * num_read or num_bad == num_read > 0):
            raise RunError(
                f"{num_bad} of the first {num_read} samples of {self.config.source} cannot be used, more than "
                f"data.max_bad_fraction {allowed:g} allows; mend them, or raise it"
            )

    def samples(self, rank: int, position: Position) -> Iterator[tuple[Position, Place, Row]]:
        """Every sample from `position` on, epoch after epoch without end, and where the process is after it.

        Raises:
            RunError: the shards of this process hold no sample, or cannot be read.
        """
        own, size = self.own_shards(rank), self.config.shuffle_buffer
        while True:
            rows = self._rows(own, position)
            block = list(itertools.islice(rows, size))
            if not block and position.shard == position.row == 0:
                raise RunError(f"data.source {self.config.source}: shards {list(own)} hold no samples")
            while block:
                first, coming = block[0][0], []
                position = replace(position, shard=first.order, row=first.row)
                draw = randomness.generator(self.seed, "block", first.epoch, first.shard, first.row)
                for number, chosen in enumerate(torch.randperm(len(block), generator=draw).tolist()):
                    coming += itertools.islice(rows, 1)  # the next block is read while this one is used
                    if number >= position.taken:
                        position = replace(position, taken=number + 1)
                        yield position, *block[chosen]
                block = [*coming, *itertools.islice(rows, size - len(coming))]
                position = replace(position, taken=0)
            position = replace(position, epoch=position.epoch + 1, shard=0, row=0)

    def _rows(self, own: range, position: Position) -> Iterator[tuple[Place, Row]]:
        """The rest of an epoch from the first sample of a block on, in the order it is read in."""
        order = torch.randperm(len(own), generator=randomness.generator(self.seed, "shards", position.epoch)).tolist()
        for place in range(position.shard, len(own)):
            shard, first = own[order[place]], position.row if place == position.shard else 0
            for number, row in enumerate(self._patient_rows(shard, first, pictures=True), start=first):
                yield Place(position.epoch, place, shard, number), row

    def _patient_rows(self, shard: int, first: int, pictures: bool) -> Iterator[Row]:
        """The rows of a shard from `first` on; where reading fails it is begun again from there, some times."""
        failures = 0
        while True:
            try:
                for row in self.shards.rows(shard, first, pictures):
                    yield row
                    first, failures = first + 1, 0
                return
            except (UserError, RunError):
                raise
            except Exception as error:  # of networks and disks, whose libraries have no common class of errors
                if failures == len(WAITS) or isinstance(error, ValueError | TypeError | KeyError):
                    raise RunError(
                        f"data.source {self.config.source}: shard {self.shards.names[shard]} cannot be read: "
                        f"{type(error).__name__}: {error}; see to it, and go on with --resume"
                    ) from None
                time.sleep(WAITS[failures])
                failures += 1


class Reader(torch.utils.data.IterableDataset):
    """A process's micro-batches from a position on. A batch is a dict as `CaptionedImages` gives it, but indices (B, 2)
    are shards and rows in them, and `position` is where the process is after it; or it holds the `fault` that ends the
    stream, and nothing else."""

    def __init__(self, stream: CaptionedStream, share: Share, count: int, position: Position):
        assert share.num_processes == stream.num_processes
        self.stream, self.share, self.count, self.position = stream, share, count, position

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._batches()
        except (UserError, RunError) as error:  # raised in a worker, it would keep the process for seconds
            yield {"fault": error}

    def _batches(self) -> Iterator[dict[str, Any]]:
        stream, config, position = self.stream, self.stream.config, self.position
        samples = stream.samples(self.share.rank, position)
        with ThreadPoolExecutor(max(1, config.num_workers)) as pool:
            in_order = pool.map if config.num_workers > 1 else map
            for _ in range(self.count):
                batch: list[tuple[Place, Row, np.ndarray]] = []
                while missing := self.share.micro_batch_size - len(batch):
                    chosen = list(itertools.islice(samples, missing))
                    pixels = list(in_order(stream.decoded, (row for _, _, row in chosen)))
                    num_read = position.num_read + len(chosen)
                    num_bad = position.num_bad + sum(values is None for values in pixels)
                    begins_epoch = chosen[-1][0].epoch > position.epoch
                    stream.check_bad(num_read, num_bad, 1 if begins_epoch else LEAST_READ)
                    position = replace(chosen[-1][0], num_read=num_read, num_bad=num_bad)
                    batch += [(p, r, x) for (_, p, r), x in zip(chosen, pixels, strict=True) if x is not None]
                yield {**self._batch(batch), "position": position}

    def _batch(self, chosen: list[tuple[Place, Row, np.ndarray]]) -> dict[str, Any]:
        config, images, captions = self.stream.config, [], []
        for place, row, pixels in chosen:
            draw = randomness.key(self.stream.seed, "augmentation", place.epoch, place.shard, place.row)
            images.append(pixels[:, :, ::-1] if config.horizontal_flip and draw % 2 else pixels)
            captions.append(row.captions[draw // 2 % len(row.captions)])
        indices = torch.tensor([(place.shard, place.row) for place, _, _ in chosen])
        return {"images": to_float(np.stack(images)), "captions": captions, "indices": indices}
