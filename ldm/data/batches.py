"""From a data set to the micro-batches of this process, in any order or streamed, and back to where it was left."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.config import DataConfig, RunConfig
from ldm.data.captions import CaptionedImages, as_is, open_images
from ldm.data.latents import CachedLatents
from ldm.data.order import MicroBatches, Share, never_seen
from ldm.data.pixels import Pixels
from ldm.data.shards import open_shards
from ldm.data.stream import CaptionedStream, Position, Reader
from ldm.errors import RunError, UserError
from ldm.training.checkpoint import Saved


def open_data(config: DataConfig, seed: int, num_processes: int = 1) -> CaptionedImages | CaptionedStream:
    """`open_images`, or with data.streaming the stream that `num_processes` share. Raises UserError as that does."""
    if config.caption_column is not None and config.caption_templates:
        tqdm.write(
            f"warning: data.caption_templates are not used: captions are those of data.caption_column "
            f"{config.caption_column!r}; set data.caption_column=null for templates",
            file=sys.stderr,
        )
    if not config.streaming:
        return open_images(config, seed)
    return CaptionedStream(config, seed, open_shards(config, num_processes), num_processes)


def micro_batches(
    data: CaptionedImages | CachedLatents | Pixels | CaptionedStream,
    config: RunConfig,
    share: Share,
    resumed: Saved | None,
) -> Iterator[dict[str, Any]]:
    """Every micro-batch of this process from step 0, or the resumed one, up to training.max_steps. Which samples they
    hold is a function of the step; of a stream, of the position it was left in.

    Raises:
        UserError: a stream was read by another number of processes, or from another number of shards; a cache held
            something else; `config.data` says how images are to be read, and a cache is.
    """
    first_step, workers = 0 if resumed is None else resumed.step, config.data.num_workers
    stream = data.images if isinstance(data, Pixels) else data
    if isinstance(stream, CaptionedStream):
        count = (config.training.max_steps - first_step) * share.accumulation
        reader = Reader(stream, share, count, _position(stream, share, resumed))
        collate = data.prepared if isinstance(data, Pixels) else as_is
        loader = DataLoader(reader, batch_size=None, num_workers=min(workers, 1), collate_fn=collate)
    else:
        _check_cache(data, config, resumed)
        if isinstance(data, CachedLatents) and resumed is None:
            _check_unread(config.data)
        buckets = data.buckets if isinstance(data, CachedLatents) else None
        if buckets is not None and (count := never_seen(buckets, share.batch_size)) and share.rank == 0:
            tqdm.write(
                f"warning: {count} images are in buckets smaller than training.batch_size {share.batch_size}, and are "
                "never seen; lower it, or cache with a smaller data.max_aspect_ratio or a larger data.bucket_step",
                file=sys.stderr,
            )
        order = MicroBatches(len(data), share, config.seed, first_step, config.training.max_steps, buckets)
        loader = DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=as_is)
    return _in_one_line(loader)


def _in_one_line(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """What `loader` gives; a worker's error comes without the traceback that DataLoader writes around it."""
    try:
        for batch in loader:
            if "fault" in batch:
                raise batch["fault"]
            yield batch
    except (UserError, RunError) as error:
        raise type(error)(str(error).rstrip().rsplit(f"{type(error).__name__}: ", 1)[-1]) from None


def data_state(accelerator: Accelerator, data: object, batch: dict[str, Any]) -> dict[str, Any]:
    """For a checkpoint: where every process is in a stream after `batch`, or what a cache holds. Every process has to
    call it."""
    if isinstance(data, CachedLatents):
        return {"cache": data.index.content}
    if "position" not in batch:
        return {}
    stream = data.images if isinstance(data, Pixels) else data
    own = torch.tensor([astuple(batch["position"])], device=accelerator.device)
    positions = [asdict(Position(*numbers)) for numbers in accelerator.gather(own).tolist()]
    return {"stream": {"shards": stream.shards.count, "positions": positions}}


def _check_cache(data: object, config: RunConfig, resumed: Saved | None) -> None:
    """Raises UserError where a resumed run would go on with another cache than it had."""
    if not isinstance(data, CachedLatents) or resumed is None or "cache" in config.resume.allow:
        return
    if resumed.state.get("cache", data.index.content) != data.index.content:
        raise UserError(
            f"--resume: cache {data.folder} no longer holds what it held when step {resumed.step} was saved; write it "
            "as it was, or allow the change with resume.allow=[cache]"
        )


def _check_unread(config: DataConfig) -> None:
    """Raises UserError where a section that is not read says anything."""
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name != "num_workers" and value != getattr(DataConfig(), item.name):
            raise UserError(
                f"data.{item.name} {value}: this stage reads no images but their cache; set it where cache_latents.py "
                "writes that"
            )


def _position(stream: CaptionedStream, share: Share, resumed: Saved | None) -> Position:
    if resumed is None or "stream" not in resumed.state:
        return Position()
    state, source = resumed.state["stream"], stream.config.source
    if len(state["positions"]) != share.num_processes:
        raise UserError(
            f"--resume: {len(state['positions'])} processes were reading {source}, and {share.num_processes} cannot "
            "go on from where each of them was; start as many as before"
        )
    if state["shards"] != stream.shards.count:
        raise UserError(
            f"--resume: {source} had {state['shards']} shards and has {stream.shards.count}; put back those it had"
        )
    return Position(**state["positions"][share.rank])
