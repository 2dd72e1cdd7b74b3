"""Imports that a command which only draws does without: otherwise a third of its time."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ABSENT = ("scipy", "sklearn", "bitsandbytes", "torchvision")
"""What transformers and diffusers import wherever it is installed."""
COMPILER = "torch._dynamo"


def leave_out() -> None:
    """Makes `ABSENT` look as if they were not installed, in a process that has not imported them yet."""
    for name in ABSENT:
        sys.modules.setdefault(name, None)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, functions may be marked for torch's compiler without importing it, which takes a second.

    Diffusers, Transformers and torch do that where they are imported and build a model. The marks mean nothing in a
    process that compiles nothing; afterwards, and for whoever asks for more than marks, there is the compiler itself.
    """
    import torch

    if COMPILER in sys.modules:
        yield
        return
    sys.modules[COMPILER] = standing_in = _Marks(COMPILER)
    standing_in.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # of its submodules
    try:
        yield
    finally:
        standing_in.make_way()


class _Marks(ModuleType):
    """Of torch's compiler what decorates functions of Diffusers, Transformers and torch itself."""

    def make_way(self) -> None:
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        return (lambda function: function) if function is None else function

    eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))  # which no model is an instance of
    allow_in_graph = assume_constant_result = staticmethod(lambda function: function)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by those who look through all
            raise AttributeError(name)
        self.make_way()
        return getattr(importlib.import_module(COMPILER), name)
