import pytest
import torch

from ldm.diffusion.guidance import classifier_free_guidance, clip_guidance, rescale_guidance, scale_in_interval
from ldm.diffusion.mixture import GaussianMixture, two_in_the_plane
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


def test_rescaling_gives_back_the_conditional_deviation():
    unconditional, conditional = random(4, 3, 8, 8), random(4, 3, 8, 8, seed=1)
    guided = classifier_free_guidance(unconditional, conditional, 7.0)

    def deviation(x):
        return x.flatten(1).std(dim=1)

    torch.testing.assert_close(rescale_guidance(guided, conditional, 0.0), guided)
    torch.testing.assert_close(deviation(rescale_guidance(guided, conditional, 1.0)), deviation(conditional))
    between = deviation(rescale_guidance(guided, conditional, 0.7))
    torch.testing.assert_close(between, 0.7 * deviation(conditional) + 0.3 * deviation(guided))
    half = rescale_guidance(guided.bfloat16(), conditional.bfloat16(), 0.7)
    assert half.dtype == torch.bfloat16  # the network's, which reads what a step makes of it
    with pytest.raises(ValueError, match=r"guidance_rescale must be in \[0, 1\], got 1.5"):
        rescale_guidance(guided, conditional, 1.5)


def test_guidance_holds_inside_the_interval_alone():
    levels = [0.0, 0.19, 0.2, 0.5, 0.9, 0.91, 1.0]
    assert [scale_in_interval(4.0, level, (0.2, 0.9)) for level in levels] == [1, 1, 4, 4, 4, 1, 1]
    assert all(scale_in_interval(4.0, level, (0.0, 1.0)) == 4 for level in levels)
    for interval in ((0.5, 0.4), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="guidance_interval must be"):
            scale_in_interval(4.0, 0.5, interval)


def test_guidance_by_an_exact_reader_draws_from_the_condition():
    """Where f(x_t)·g(c) is log p(c | x_t), Bayes' rule makes the guided ε that of the data given c."""
    mixture, alpha_bar = two_in_the_plane(), torch.full((32,), 0.4, dtype=torch.float64)
    second = GaussianMixture(torch.ones(1, dtype=torch.float64), mixture.means[1:], mixture.deviations[1:])
    x_t = random(32, 2)

    def log_share(x):
        return mixture.weights[1].log() + second.log_density(x, alpha_bar) - mixture.log_density(x, alpha_bar)

    guided = clip_guidance(mixture.epsilon(x_t, alpha_bar), x_t, alpha_bar, log_share, 1.0)
    torch.testing.assert_close(guided, second.epsilon(x_t, alpha_bar), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="scale must be >= 0, got -1"):
        clip_guidance(x_t, x_t, alpha_bar, log_share, -1.0)


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
