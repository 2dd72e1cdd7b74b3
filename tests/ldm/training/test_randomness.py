"""Keyed randomness: equal keys, equal numbers; different keys, unrelated numbers."""

import torch

from ldm.training.randomness import generator, key, seed_dropout


def test_draws_depend_on_every_key_and_on_nothing_else():
    draw = torch.randn(4, generator=generator(0, "noise", 3))
    torch.randn(10)
    assert torch.equal(draw, torch.randn(4, generator=generator(0, "noise", 3)))
    keys = [key(0, "noise", 3), key(1, "noise", 3), key(0, "order", 3), key(0, "noise", 4), key(0, "noise", 3, 0)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_streams_are_unrelated():
    streams = torch.stack([torch.randn(4000, generator=generator(0, "noise", step)) for step in range(8)])
    correlation = torch.corrcoef(streams) - torch.eye(8)
    assert correlation.abs().max() < 5 / 4000**0.5
    assert abs(streams.mean()) < 5 / 32_000**0.5


def test_dropout_differs_between_ranks_and_repeats():
    def mask(step, rank):
        seed_dropout(0, step, rank)
        return torch.nn.functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(mask(1, 0), mask(1, 0))
    assert not torch.equal(mask(1, 0), mask(1, 1))
    assert not torch.equal(mask(1, 0), mask(2, 0))
