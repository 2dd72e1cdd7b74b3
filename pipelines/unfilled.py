"""Networks that are built without memory and without the first values of their weights, which files replace."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FILL = ("normal_", "uniform_", "triu_")
"""Functions that write to a tensor and return it."""


class Unfilled(TorchFunctionMode):
    """Inside, tensors on the meta device, which have no values, are not filled, and others are made like them as of
    their shape. Torch has these functions on that device in Python, and imports its algebra of sizes for them."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # a method's, or a function's of torch.nn.init
        if isinstance(tensor, Tensor) and tensor.is_meta:
            if getattr(function, "__name__", None) in FILL:
                return tensor
            if function is torch.empty_like:
                return torch.empty(tensor.shape, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})
        return function(*args, **kwargs)
