"""The measures equal torchmetrics', torch-fidelity's and prdc's on the same features, within 1e-4 relative."""

import pytest
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.evaluation.alignment import clip_score
from ldm.evaluation.distances import frechet_distance, kernel_distance, neighbour_measures
from ldm.evaluation.reconstruction import psnr

SIZE = 16


class AsTheyAre(nn.Module):
    """Features of features, for metrics that bring a network of their own."""

    num_features = SIZE

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    """Of 400 real images and of 300 drawn ones: other means, other correlated covariances."""
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(400, SIZE, generator=draw) @ torch.randn(SIZE, SIZE, generator=draw)
    drawn = torch.randn(300, SIZE, generator=draw) @ torch.randn(SIZE, SIZE, generator=draw) + 0.5
    return real, drawn


def test_frechet_distance(features):
    real, drawn = features
    metric = FrechetInceptionDistance(feature=AsTheyAre())
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    assert frechet_distance(real, drawn) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_kernel_distance_of_all_images(features):
    """One subset that is everything leaves nothing to chance."""
    real, drawn = (x[:300] for x in features)
    metric = KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=300)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    theirs = kid_features_to_metric(real, drawn, kid_subsets=1, kid_subset_size=300, verbose=False)
    ours, spread = kernel_distance(real, drawn, subset_size=300, subsets=1, seed=3)
    assert spread == 0
    assert ours == pytest.approx(metric.compute()[0].item(), rel=1e-4)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_kernel_distance_over_subsets(features):
    """Other subsets, the same distribution: means that differ by less than four of their standard errors."""
    theirs = kid_features_to_metric(*features, kid_subsets=200, kid_subset_size=50, verbose=False, rng_seed=1)
    mean, spread = kernel_distance(*features, subset_size=50, subsets=200, seed=1)
    error = (2 / 200) ** 0.5 * spread
    assert abs(mean - theirs["kernel_inception_distance_mean"]) < 4 * error
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.3)


@pytest.mark.parametrize("k", [3, 5])
def test_neighbour_measures(features, k):
    real, drawn = features[0], torch.cat([features[0][:40] + 0.01, features[1]])
    ours = neighbour_measures(real, drawn, k)
    theirs = compute_prdc(real.double().numpy(), drawn.double().numpy(), nearest_k=k)
    assert 0.05 < ours["precision"] < 0.95 and 0.05 < ours["recall"] < 0.95
    assert ours == pytest.approx({name: float(value) for name, value in theirs.items()}, rel=1e-4)


def test_clip_score():
    draw = torch.Generator().manual_seed(1)
    images, texts = torch.randn(5, 8, generator=draw) + 1, torch.randn(5, 8, generator=draw) + 1

    class Model(nn.Module):
        def get_image_features(self, values):
            return images

        def get_text_features(self, ids, mask):
            return texts

    def processor(**_):
        return dict.fromkeys(("pixel_values", "input_ids", "attention_mask"), torch.zeros(5, 1))

    Model.config = type("Config", (), {})
    theirs = torchmetrics_clip_score(list(torch.zeros(5, 3, 4, 4)), ["a"] * 5, lambda: (Model(), processor))
    assert clip_score(images, texts) == pytest.approx(theirs.item(), rel=1e-4)


def test_psnr():
    a, b = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    theirs = peak_signal_noise_ratio(b, a, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(a, b), theirs, rtol=1e-4, atol=0)
