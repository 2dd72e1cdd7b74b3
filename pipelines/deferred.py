"""Imports that a command which only draws does without: otherwise a third of its time."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NEVER = ("scipy", "sklearn", "bitsandbytes", "torchvision")
"""What transformers and diffusers import wherever it is installed, and drawing does not need."""
COMPILER = "torch._dynamo"


def leave_out(*names: str) -> None:
    """Makes packages look as if they were not installed, in a process that has not imported them yet."""
    for name in names:
        sys.modules.setdefault(name, None)


@contextmanager
def drawing_alone() -> Iterator[None]:
    """For the imports of a process that compiles nothing and is the only one: inside, torch is as if built without
    `torch.distributed`, and functions may be marked for its compiler without importing that.

    Transformers would import all that divides tensors among processes, half a second. Diffusers, Transformers and torch
    mark functions where they are imported and build a model, and import the compiler for it, a second. The marks mean
    nothing where nothing is compiled; afterwards, and for whoever asks for more, there is the compiler itself.
    """
    import torch

    standing_in = _Marks(COMPILER)
    standing_in.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # of its submodules
    sys.modules.setdefault(COMPILER, standing_in)
    distributed, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = distributed
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
