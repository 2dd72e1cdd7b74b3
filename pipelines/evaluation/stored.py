"""Pictures that are read when they are looked at: thousands of large ones need not fit in the memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import RunError


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Raises `RunError` where what is written within, to `path`, cannot be."""
    try:
        yield
    except OSError as error:
        raise RunError(f"'{path}' could not be written: {error.strerror or error}; run it again to go on") from None


@dataclass(frozen=True)
class Pictures:
    """Addressed by their place, as uint8 (3, S, S)."""

    read: Callable[[Sequence[int]], Tensor]
    """Numbers -> (B, 3, S, S) uint8."""
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor:
        return self.read([self.numbers[place]])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (picture for part in self.split(64) for picture in part)

    def split(self, size: int) -> Iterator[Tensor]:
        """All of them in turn, (B, 3, S, S) with B up to `size`."""
        for start in range(0, len(self), size):
            yield self.read(self.numbers[start : start + size])

    def first(self, count: int) -> "Pictures":
        return Pictures(self.read, self.numbers[:count])

    def tensor(self) -> Tensor:
        """All at once, (N, 3, S, S)."""
        return torch.cat(list(self.split(256)))
