"""Figures of an evaluation, from features and distances that are known."""

import pytest
import torch

from ldm.evaluation.distances import frechet_distance
from pipelines.evaluation import images
from pipelines.evaluation.images import distance_figures, memory_figures
from pipelines.evaluation.parts import reconstruction_distance
from pipelines.evaluation.pictures import FONT, _wrapped

SAID = {"against": "some", "network": "any", "weights": "of it", "remark": "said"}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_of_a_reconstruction_distance_is_as_wide_as_other_images_spread_it():
    """An image and its reconstruction go together: which images are taken moves the distance but little."""
    pairs = [
        (x, 0.9 * x + 0.1 * normal(200, 8, seed=100 + seed)) for seed in range(30) for x in [normal(200, 8, seed=seed)]
    ]
    values = torch.tensor([frechet_distance(*pair) for pair in pairs])
    figures = [reconstruction_distance(*pair, seed=0, **SAID) for pair in pairs[:5]]
    width = sum(high - low for low, high in (figure.interval for figure in figures)) / 5
    assert [figure.value for figure in figures] == pytest.approx(values[:5].tolist())
    assert width == pytest.approx(2 * 1.96 * values.std().item(), rel=0.4)


def test_a_kernel_distance_says_of_which_subsets_it_is_a_mean():
    figures = distance_figures("Part", normal(30, 4, seed=0), None, normal(40, 4, seed=1), 0, **SAID)
    remarks = {figure.name: figure.remark for figure in figures}
    assert remarks.pop("kernel distance") == "mean over 100 subsets of 30 images; said"
    assert set(remarks.values()) == {"said"}


def test_an_interval_of_few_resamples_says_so(monkeypatch):
    assert "of 10 resamples" in images.few_rounds(768) and images.few_rounds(256) == ""
    monkeypatch.setattr(images, "LARGE", 2)
    drawn, real = normal(30, 4, seed=0), normal(40, 4, seed=1)
    figures = distance_figures("Part", drawn, None, real, 0, **SAID)
    for figure in (figures[0], reconstruction_distance(drawn, real[:30], seed=0, **SAID)):
        assert figure.remark == "its interval is a rough one, of 25 resamples where others have 200; said"
    assert "resamples" not in "".join(figure.remark for figure in figures[1:])


def test_farther_from_training_images_than_others_lie_is_not_better():
    """A model of noise lies farthest."""
    median, ratio = memory_figures(torch.full((9,), 3.0), torch.full((9,), 2.0), 0, **SAID)
    assert (median.value, ratio.value, ratio.better) == (3.0, 1.5, "")


@pytest.mark.parametrize("text", ["a cat", "a cat on a sofa " * 9, "A MERCEDES-BENZ W201 " * 9, "W" * 90, ""])
def test_captions_stay_within_their_place(text):
    lines = _wrapped(text, 112, 4)
    assert 1 <= len(lines) <= 4 and all(FONT.getlength(line) <= 112 for line in lines)
    assert lines == [text] if len(text) < 9 else lines[-1].endswith("…")
