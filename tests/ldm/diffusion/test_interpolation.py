import itertools
import math

import pytest
import torch

from ldm.diffusion.interpolation import slerp, text_diff_direction

SHARES = torch.linspace(0, 1, 9, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(vector):
    return vector / vector.norm()


def angle(a, b):
    return 2 * torch.atan2((unit(a) - unit(b)).norm(), (unit(a) + unit(b)).norm()).item()


@pytest.mark.parametrize("shape", [(2,), (16,), (4, 8, 8)])
def test_ends_norms_and_equal_angles(shape):
    start, end = random(*shape), 3 * random(*shape, seed=1)
    path = slerp(start, end, SHARES)
    assert path.shape == (9, *shape) and path.dtype == start.dtype
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end)
    torch.testing.assert_close(path.flatten(1).norm(dim=1), (1 - SHARES) * start.norm() + SHARES * end.norm())
    whole = angle(start, end)
    for one, next_one in itertools.pairwise(path):
        assert angle(one, next_one) == pytest.approx(whole / 8, abs=1e-12)


def test_unit_vectors_at_right_angles_in_closed_form():
    path = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1 / 3]))
    torch.testing.assert_close(path[0], torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


def test_the_way_back_is_the_same_way():
    start, end = random(16), random(16, seed=1)
    torch.testing.assert_close(slerp(start, end, SHARES), slerp(end, start, 1 - SHARES))


def test_noise_stays_of_the_norm_of_noise_where_a_line_leaves_it():
    start, end = random(4, 32, 32), random(4, 32, 32, seed=1)
    middle = slerp(start, end, torch.tensor([0.5]))[0]
    assert middle.std() == pytest.approx(1, abs=0.05)
    assert ((start + end) / 2).std() == pytest.approx(math.sqrt(0.5), abs=0.05)


@pytest.mark.parametrize("nearly", [0.0, 1e-12, 1e-7])
def test_parallel_vectors(nearly):
    start = random(16)
    path = slerp(start, 2 * start + nearly * random(16, seed=1), SHARES)
    torch.testing.assert_close(path, (1 + SHARES[:, None]) * start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", [random(16), torch.tensor([1.0, 0.0, 0.0]).double()])
def test_opposite_vectors_go_half_round(start):
    path = slerp(start, -start, SHARES)
    assert torch.isfinite(path).all()
    torch.testing.assert_close(path[[0, -1]], torch.stack([start, -start]))
    torch.testing.assert_close(path.norm(dim=1), start.norm().expand(9))
    for share, point in zip(SHARES, path, strict=True):
        assert angle(start, point) == pytest.approx(math.pi * share.item(), abs=1e-7)


def test_a_vector_of_no_length_takes_the_others_direction():
    end = random(16)
    torch.testing.assert_close(slerp(torch.zeros(16).double(), end, SHARES), SHARES[:, None] * end)
    assert not slerp(torch.zeros(16), torch.zeros(16), SHARES).any()


def test_single_precision_ends():
    start, end = random(16).float(), random(16, seed=1).float()
    torch.testing.assert_close(slerp(start, end, SHARES)[[0, -1]], torch.stack([start, end]))


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(4,\)"):
        slerp(torch.zeros(3), torch.zeros(4), SHARES)


def test_a_text_diff_is_the_difference_of_directions():
    text, base = random(16), random(16, seed=1)
    direction = text_diff_direction(text, base)
    torch.testing.assert_close(direction, unit(unit(text) - unit(base)))
    torch.testing.assert_close(text_diff_direction(5 * text, 0.1 * base), direction)
    torch.testing.assert_close(text_diff_direction(base, text), -direction)
    with pytest.raises(ValueError, match="the same embedding"):
        text_diff_direction(text, text)
