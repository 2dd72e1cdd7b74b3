"""Lean norms against torch's own."""

import pytest
import torch
from torch import nn

from ldm.training.norms import make_lean

NORMS = {
    "group": (lambda: nn.GroupNorm(2, 8), (3, 8, 4, 5)),
    "group, without weights": (lambda: nn.GroupNorm(2, 8, affine=False), (3, 8, 4, 5)),
    "layer": (lambda: nn.LayerNorm(8), (3, 5, 8)),
    "layer, without a bias": (lambda: nn.LayerNorm(8, bias=False), (3, 5, 8)),
}


def computed(norm, x, grad):
    """Output, and gradients of the input and the weights."""
    x = x.clone().requires_grad_()
    y = norm(x)
    return y, *torch.autograd.grad(y, (x, *norm.parameters()), grad.to(y.dtype))


@pytest.fixture(params=NORMS)
def case(request):
    """Torch's norm, a lean one with the same random weights, an input and a gradient of the output."""
    torch.manual_seed(0)
    make, shape = NORMS[request.param]
    norms = make(), make()
    for parameter in norms[0].parameters():
        nn.init.normal_(parameter)
    norms[1].load_state_dict(norms[0].state_dict())
    make_lean(norms[1])
    return *norms, 2 * torch.randn(shape) + 1, torch.randn(shape)


def test_in_fp32_it_is_the_same(case):
    norm, lean, x, grad = case
    torch.testing.assert_close(computed(lean, x, grad), computed(norm, x, grad), rtol=0, atol=0)


def test_bf16_is_rounded_before_and_after_alone(case):
    norm, lean, x, grad = case
    x, grad = x.bfloat16(), grad.bfloat16()
    expected = computed(norm, x.float(), grad.float())
    for ours, theirs in zip(computed(lean, x, grad), expected, strict=True):
        rounded = theirs.bfloat16() if ours.dtype == torch.bfloat16 else theirs
        torch.testing.assert_close(ours, rounded, rtol=1e-6, atol=1e-6)
    assert lean(x).dtype == torch.bfloat16


def test_the_input_alone_is_kept(case):
    _, lean, x, _ = case
    kept = []
    x = x.bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lean(x)
    large = [tensor for tensor in kept if tensor.numel() == x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_frozen_weights_get_no_gradient(case):
    _, lean, x, _ = case
    lean.requires_grad_(False)
    x = x.requires_grad_()
    lean(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(parameter.grad is None for parameter in lean.parameters())
