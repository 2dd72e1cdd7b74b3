"""Imports that a command which only draws does without: otherwise two fifths of its time."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NEVER = ("scipy", "sklearn", "bitsandbytes", "torchvision")
"""What transformers and diffusers import wherever it is installed, and drawing does not need."""
COMPILER = "torch._dynamo"
SIZES = "torch.fx.experimental.symbolic_shapes"
MODELS = "transformers.models"


def leave_out(*names: str) -> None:
    """Makes packages look as if they were not installed, in a process that has not imported them yet."""
    for name in names:
        sys.modules.setdefault(name, None)


@contextmanager
def drawing_alone() -> Iterator[None]:
    """For the imports of a process that compiles nothing and is the only one, and for opening its model: inside, torch
    is as if built without `torch.distributed`, and three modules have stand-ins, which give way afterwards, and to
    whoever asks for more than they have.

    Transformers would import all that divides tensors among processes, half a second. Diffusers, Transformers and torch
    mark functions for torch's compiler where they are imported and build a model, and import it for that, a second; and
    its algebra of sizes, a quarter, because they name an attention that it compiles, and for tensors without memory
    (`Unfilled`). The package of Transformers' models reads the source of all of them a second time, another quarter.
    """
    import torch

    from pipelines.unfilled import Unfilled

    standing_in = [_Marks(COMPILER), _Sizes(SIZES), _StandIn(MODELS)]
    for module in standing_in:
        sys.modules.setdefault(module.__name__, module)
    distributed, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        with Unfilled():
            yield
    finally:
        torch.distributed.is_available = distributed
        for module in standing_in:
            module.make_way()


class _StandIn(ModuleType):
    """A package whose own code does not run. Its modules can be imported; what else is asked of it, the package has."""

    def __init__(self, name: str):
        super().__init__(name)
        top, *inner = name.split(".")
        self.__path__ = [str(Path(importlib.util.find_spec(top).origin).parent.joinpath(*inner))]

    def make_way(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by those who look through all
            raise AttributeError(name)
        self.make_way()
        return getattr(importlib.import_module(self.__name__), name)


class _Marks(_StandIn):
    """Of torch's compiler what decorates functions of Diffusers, Transformers and torch itself. The marks mean nothing
    where nothing is compiled."""

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        return (lambda function: function) if function is None else function

    eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))  # which no model is an instance of
    allow_in_graph = assume_constant_result = staticmethod(lambda function: function)


class _Sizes(_StandIn):
    """Of torch's algebra of sizes what is asked of sizes that are numbers, as all are where nothing is compiled."""

    has_free_unbacked_symbols = staticmethod(lambda size: False)
    expect_true = staticmethod(bool)  # of a condition that torch 2.14 checks where it counts up
