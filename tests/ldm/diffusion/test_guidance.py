import pytest
import torch

from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.prior import best_of, derived_generator


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_scale_0_is_unconditional_and_1_conditional():
    unconditional, conditional = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 1.0), conditional)


@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_equals_ho_and_salimans_equation_6(w):
    unconditional, conditional = random(2, 3), random(2, 3, seed=1)
    expected = (1 + w) * conditional - w * unconditional
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, w + 1), expected)


def test_guiding_epsilon_guides_x0_alike():
    """x₀ is affine in ε at a fixed z_t, so guidance commutes with the conversion."""
    z, alpha, sigma = random(2, 3, seed=2), 0.8, 0.6
    unconditional, conditional = random(2, 3), random(2, 3, seed=1)

    def x_start(epsilon):
        return (z - sigma * epsilon) / alpha

    torch.testing.assert_close(
        x_start(classifier_free_guidance(unconditional, conditional, 4.0)),
        classifier_free_guidance(x_start(unconditional), x_start(conditional), 4.0),
    )


def test_best_of_takes_the_larger_dot_product_in_each_row():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    candidates = torch.tensor([[[2.0, 0], [1, 9]], [[9, 1], [1, 2]], [[3, 3], [-9, -9]]])
    assert best_of(candidates, text).tolist() == [[2, 0], [1, 2], [3, 3]]


def test_best_of_is_a_candidate_and_none_is_closer():
    candidates, text = random(16, 5, 8), random(16, 8, seed=1)
    chosen = best_of(candidates, text)
    scores = (candidates * text[:, None]).sum(-1)
    assert torch.equal((chosen * text).sum(-1), scores.max(dim=1).values)
    assert all(any(torch.equal(row, c) for c in rows) for row, rows in zip(chosen, candidates, strict=True))


def test_best_of_one_is_that_one():
    candidates = random(3, 1, 4)
    assert torch.equal(best_of(candidates, random(3, 4, seed=1)), candidates[:, 0])


def test_a_derived_generator_is_a_function_of_the_state_and_leaves_it_alone():
    source = torch.Generator().manual_seed(3)
    state = source.get_state()

    def draws(index):
        return torch.randn(64, generator=derived_generator(source, index))

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    assert torch.equal(source.get_state(), state)
    before = draws(1)
    own = torch.randn(64, generator=source)
    assert not torch.equal(before, own)
    assert not torch.equal(draws(1), before)
