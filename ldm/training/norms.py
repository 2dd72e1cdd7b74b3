"""Norms that are fast and lean under bf16 autocast on CPUs.

They compute in fp32, as torch's kernels for bf16 take five times as long, but take and give bf16 and keep that alone
for the backward pass: of each number two bytes of input, where fp32 has four, and as many of what follows the norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def make_lean(model: nn.Module) -> None:
    """Has every GroupNorm and LayerNorm of `model` compute so, in place; names of weights stay as they are."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.__class__ = LeanGroupNorm
        elif isinstance(module, nn.LayerNorm):
            module.__class__ = LeanLayerNorm


class LeanGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


class LeanLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return _LayerNorm.apply(x, self.weight, self.bias, list(self.normalized_shape), self.eps)


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        ctx.shape = x.shape[0], x.shape[1], x[0, 0].numel(), groups
        y, mean, std_inverse = aten.native_group_norm(x.float(), weight, bias, *ctx.shape, eps)
        ctx.save_for_backward(x, mean, std_inverse, weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, std_inverse, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads = aten.native_group_norm_backward(grad.float(), x.float(), mean, std_inverse, weight, *ctx.shape, wanted)
        return None if grads[0] is None else grads[0].to(x.dtype), *grads[1:], None, None


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        ctx.shape = shape
        y, mean, std_inverse = aten.native_layer_norm(x.float(), shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, std_inverse, weight, bias)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, std_inverse, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads = aten.native_layer_norm_backward(
            grad.float(), x.float(), ctx.shape, mean, std_inverse, weight, bias, wanted
        )
        return None if grads[0] is None else grads[0].to(x.dtype), *grads[1:], None, None
