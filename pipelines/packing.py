"""What a network that takes many steps need not do at each, on a CPU.

A convolution of torch rearranges its weights whenever it runs, and what it reads and gives unless channels lie last; a
large linear layer in float32 goes to a library which many processors are slow with: oneDNN multiplies by weights that
are laid out for it once. Attention computes the keys and values of a text that is the one of the step before. In twenty
steps of a small U-Net that is a quarter of the time.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

LARGEST = 2**28
"""Bytes of a network's weights. They are held twice, and a larger network spends its time multiplying by them."""
LEAST = 2**22
"""Multiplications of a linear layer. With fewer, starting oneDNN costs more than its speed gives."""
OPERATORS = ("_convolution_pointwise", "_reorder_convolution_weight", "_linear_pointwise", "_reorder_linear_weight")
"""Of `torch.ops.mkldnn`: those that torch's own compiler writes where the weights do not change."""


@contextmanager
def packed(network: nn.Module) -> Iterator[None]:
    """Inside, a float32 network on a CPU computes the same faster, from the weights that it has on entry.

    A layer's weights are rearranged when it first sees an input of some shape, its text read when it changes. Without
    effect on other networks, on those that are compiled, and where gradients or autocast are asked for.
    """
    layers = [module for module in network.modules() if _can_pack(module)] if _is_worth_it(network) else []
    for layer in layers:
        layer.forward = functools.partial(FORWARDS[type(layer)], layer, {})
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
    if type(module) is Attention:
        further = (module.spatial_norm, module.group_norm, module.norm_cross, module.norm_q, module.norm_k)
        return (
            _is_at_hand(module)
            and type(module.processor) is AttnProcessor2_0
            and type(module.to_k) is type(module.to_v) is nn.Linear  # adapters may change between steps
            and _is_at_hand(module.to_k)
            and all(norm is None for norm in further)
            and not module.residual_connection
            and module.rescale_output_factor == 1
        )
    if type(module) is nn.Conv2d:
        return _is_at_hand(module) and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear and _is_at_hand(module)


def _is_at_hand(module: nn.Module) -> bool:
    """Whether it computes by itself, in float32 on a CPU: what moves weights between devices replaces `forward`."""
    weights = module.parameters()
    return "forward" not in vars(module) and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)


def _convolve(layer: nn.Conv2d, weights: dict[torch.Size, Tensor], x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.ndim != 4:
        return nn.Conv2d.forward(layer, x)
    options = (layer.padding, layer.stride, layer.dilation, layer.groups)
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape not in weights:
        weights[x.shape] = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *options, x.shape)
    return torch.ops.mkldnn._convolution_pointwise(x, weights[x.shape], layer.bias, *options, "none", [], "")


def _multiply(layer: nn.Linear, weights: dict[int, Tensor], x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if x.dtype != torch.float32 or rows * layer.weight.numel() < LEAST:
        return F.linear(x, layer.weight, layer.bias)
    if rows not in weights:
        weights[rows] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    return torch.ops.mkldnn._linear_pointwise(x, weights[rows], layer.bias, "none", [], "")


def _attend(
    layer: Attention,
    read: dict[str, Tensor],
    x: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: object,
) -> Tensor:
    """x (B, S, W), to itself or to the text, (B, L, D_t)."""
    if options or attention_mask is not None or x.ndim != 3:
        return Attention.forward(layer, x, encoder_hidden_states, attention_mask, **options)

    def heads(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # (B, heads, S, width of a head)

    if encoder_hidden_states is None:
        key, value = heads(layer.to_k(x)), heads(layer.to_v(x))
    else:
        text = encoder_hidden_states
        if not read or not torch.equal(read["text"], text):
            read.update(text=text.clone(), key=heads(layer.to_k(text)), value=heads(layer.to_v(text)))
        key, value = read["key"], read["value"]
    seen = F.scaled_dot_product_attention(heads(layer.to_q(x)), key, value)
    return layer.to_out[1](layer.to_out[0](seen.transpose(1, 2).flatten(2)))


FORWARDS = {nn.Conv2d: _convolve, nn.Linear: _multiply, Attention: _attend}
"""How layers of these classes compute where they are packed, from what they keep."""
