"""Weights laid out once a call as oneDNN multiplies by them, on a CPU.

A convolution of torch rearranges its weights whenever it runs, and a linear layer in float32 goes to another library,
which many processors are slow with. In twenty steps of a small U-Net that is a fifth of the time.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LARGEST = 2**28
"""Bytes of a network's weights. They are held twice, and a larger network spends its time multiplying by them."""
OPERATORS = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
"""Of `torch.ops.mkldnn`: those that torch's own compiler writes where the weights do not change."""


@contextmanager
def packed(network: nn.Module) -> Iterator[None]:
    """Inside, a float32 network on a CPU computes the same faster, from the weights that it has on entry.

    Every layer's weights are rearranged when it first sees an input of some shape. Without effect on other networks,
    on those that are compiled, and where gradients or autocast are asked for.
    """
    layers = [module for module in network.modules() if _can_pack(module)] if _is_worth_it(network) else []
    for layer in layers:
        layer.forward = functools.partial(_convolve if isinstance(layer, nn.Conv2d) else _multiply, layer, {})
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def draws_packed(call: Callable) -> Callable:
    """A method of a pipeline throughout which its U-Net is `packed`."""

    @functools.wraps(call)
    def packing(self, *args, **keywords):
        with packed(self.unet):
            return call(self, *args, **keywords)

    return packing


def _is_worth_it(network: object) -> bool:
    if not isinstance(network, nn.Module) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return False
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in network.modules()):
        return False
    return sum(weight.nbytes for weight in network.parameters()) <= LARGEST


def _can_pack(module: nn.Module) -> bool:
    return (
        type(module) in (nn.Conv2d, nn.Linear)
        and "forward" not in module.__dict__  # replaced by what moves weights between devices
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and not isinstance(getattr(module, "padding", 0), str)
    )


def _convolve(layer: nn.Conv2d, weights: dict[torch.Size, Tensor], x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.ndim != 4:
        return nn.Conv2d.forward(layer, x)
    options = (layer.padding, layer.stride, layer.dilation, layer.groups)
    if x.shape not in weights:
        weights[x.shape] = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *options, x.shape)
    return torch.ops.mkldnn._convolution_pointwise(x, weights[x.shape], layer.bias, *options, "none", [], "")


def _multiply(layer: nn.Linear, weights: dict[int, Tensor], x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.numel():
        return nn.Linear.forward(layer, x)
    rows = x.numel() // x.shape[-1]
    if rows not in weights:
        weights[rows] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    return torch.ops.mkldnn._linear_pointwise(x, weights[rows], layer.bias, "none", [], "")
