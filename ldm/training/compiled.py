"""Networks compiled block by block, which takes less time than a whole U-Net does, for nearly the same speed."""

import struct
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

LINKED_WITHIN = 5.0
"""Seconds in which another process that is compiling has written the whole of a library."""


def compile_blocks(model: nn.Module, activation_memory: float = 1.0) -> None:
    """Has every block of `model` compiled in place when it is first called; names of weights stay as they are.

    activation_memory: the share, in (0, 1], of what a block would keep for its backward pass; the rest is computed
    again, those activations first that cost least. Holds for the whole process.
    """
    discard_unfinished(Path(cache_dir()))
    torch._functorch.config.activation_memory_budget = activation_memory
    blocks = outermost(model)
    # One graph for each shape of a block's weights and input, in training and outside; beyond the limit torch stops
    # compiling without a word.
    limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * limit)
    for block in blocks:
        block.compile(dynamic=False)


def outermost(module: nn.Module) -> list[nn.Module]:
    """The blocks, of which the networks of all stages are made, of `module` that are in no other block."""
    from open_clip.transformer import ResidualAttentionBlock  # seconds of imports, for runs that compile alone

    if isinstance(module, (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, ResidualAttentionBlock)):
        return [module]
    return [block for child in module.children() for block in outermost(child)]


def discard_unfinished(cache: Path) -> list[Path]:
    """Removes from torch's cache the libraries that a killed run left half linked, and returns them: torch writes them
    in place, and every later run would load them and fail."""
    unfinished = []
    for path in cache.glob("*/*.so"):
        with suppress(FileNotFoundError):  # another process may remove it first
            if time.time() - path.stat().st_mtime > LINKED_WITHIN and not is_whole(path):
                path.unlink()
                unfinished.append(path)
    return unfinished


def is_whole(library: Path) -> bool:
    """Whether a file is as long as its ELF header, which a linker writes last, says; elsewhere than on Linux, whether
    anything is in it."""
    size = library.stat().st_size
    if sys.platform != "linux" or size == 0:
        return size > 0
    with library.open("rb") as file:
        header = file.read(64)  # of 64 bits: torch has no others
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    order = ">" if header[5] == 2 else "<"
    (begin,), (entry, count) = struct.unpack_from(f"{order}Q", header, 40), struct.unpack_from(f"{order}HH", header, 58)
    return begin > 0 and begin + entry * count <= size  # the table of sections, which is at the end
