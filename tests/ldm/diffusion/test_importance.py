import pytest
import torch

from ldm.diffusion import importance

DOUBLE = torch.float64


def full_history(scales):
    """Terms whose root mean square is scales[t]."""
    history = importance.empty_history(len(scales))
    for _ in range(importance.HISTORY):
        history = importance.remember(history, torch.arange(len(scales)), torch.tensor(scales, dtype=DOUBLE))
    return history


def test_uniform_until_every_timestep_has_its_history():
    history = importance.empty_history(4)
    for number in range(importance.HISTORY):
        assert torch.equal(importance.probabilities(history), torch.full((4,), 0.25, dtype=DOUBLE))
        history = importance.remember(history, torch.arange(4), torch.tensor([1.0, 1.0, 1.0, float(number)]))
    assert importance.probabilities(history)[3] > 0.5


def test_probability_follows_the_root_mean_square():
    p = importance.probabilities(full_history([1.0, 3.0, 0.0, 6.0]))
    assert p.sum().item() == pytest.approx(1)
    expected = torch.tensor([0.1, 0.3, 0.0, 0.6], dtype=DOUBLE) * 0.999 + 0.001 / 4
    torch.testing.assert_close(p, expected)


def test_the_oldest_term_is_forgotten():
    history = full_history([1.0, 1.0])
    for number in range(3):
        history = importance.remember(history, torch.tensor([1]), torch.tensor([10.0 + number]))
    assert history[0].tolist() == [1.0] * 10
    assert history[1].tolist() == [1.0] * 7 + [10.0, 11.0, 12.0]


def test_weights_keep_the_mean_unbiased():
    p = importance.probabilities(full_history([1.0, 2.0, 0.5, 8.0]))
    draws = (torch.arange(100_000, dtype=DOUBLE) + 0.5) / 100_000
    t, weight = importance.draw_timesteps(draws, p)
    shares = torch.bincount(t, minlength=4) / len(t)
    torch.testing.assert_close(shares.double(), p, atol=1e-4, rtol=0)
    terms = torch.tensor([3.0, -1.0, 2.0, 10.0], dtype=DOUBLE)
    assert (weight * terms[t]).mean().item() == pytest.approx(terms.mean().item(), abs=1e-2)
    assert importance.draw_timesteps(torch.tensor([0.0, 1 - 1e-12], dtype=DOUBLE), p)[0].tolist() == [0, 3]


def test_a_timestep_out_of_range_is_refused():
    with pytest.raises(ValueError, match="t must be in 0 … 3, got 4"):
        importance.remember(importance.empty_history(4), torch.tensor([4]), torch.tensor([1.0]))
