"""Networks without memory are built the same, and others are filled as ever."""

from contextlib import nullcontext

import torch
from diffusers import PriorTransformer
from torch import nn

from pipelines.unfilled import Unfilled


def prior() -> PriorTransformer:
    return PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=16)


def test_what_has_no_values_is_not_filled():
    with torch.device("meta"):
        expected = prior()
        with Unfilled():
            built = prior()
            embedding = nn.Embedding(3, 4)
    for (name, one), (_, other) in zip(expected.state_dict().items(), built.state_dict().items(), strict=True):
        assert other.is_meta and (one.shape, one.dtype) == (other.shape, other.dtype), name
    assert built.causal_attention_mask.shape == expected.causal_attention_mask.shape
    assert embedding.weight.is_meta and embedding.weight.requires_grad


def test_what_has_values_is():
    built = []
    for context in (nullcontext(), Unfilled()):
        torch.manual_seed(0)
        with context:
            built.append(prior())
    for one, other in zip(*(network.state_dict().values() for network in built), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*(network.causal_attention_mask for network in built))


def test_a_tensor_like_one_without_memory():
    like = torch.empty(2, 3, dtype=torch.float16, device="meta")
    with Unfilled():
        made = (torch.empty_like(like), torch.empty_like(like, device="cpu"), torch.empty_like(like, dtype=torch.int64))
    assert [(one.device.type, one.dtype, tuple(one.shape)) for one in made] == [
        ("meta", torch.float16, (2, 3)), ("cpu", torch.float16, (2, 3)), ("meta", torch.int64, (2, 3))
    ]  # fmt: skip
