"""How much of an image an autoencoder keeps: each measure (N,) of originals and reconstructions (N, C, H, W) in [0, 1].

Means over images are the caller's; the Fréchet distance between the two sets is in `distances`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.downloads import cached, download

SMALLEST_FOR_SSIM = 11
"""Pixels a side: the width of its window."""
SMALLEST_FOR_LPIPS = 31
"""Pixels a side, of which AlexNet's last layer but one still leaves something."""
LEAST_ERROR = 1e-10
"""Mean squared error, below which a PSNR is 100 dB: an infinite one has no mean, and no place in JSON."""


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log₁₀(1 / MSE) of each image, at most 100; reconstructions are clipped to
    [0, 1], as pictures are. As torchmetrics' peak_signal_noise_ratio with data_range=1. Raises UserError for shapes or
    ranges that do not fit."""
    originals, reconstructions = _pair(originals, reconstructions)
    error = (originals - reconstructions).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=LEAST_ERROR))


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity, at most 1, of each image (Wang et al. 2004), by torchmetrics: a Gaussian window of 11 × 11
    pixels with σ = 1.5. Raises UserError where torchmetrics is not installed, and as `psnr`."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise UserError('SSIM needs torchmetrics; pip install "ldm[evaluation]"') from None
    originals, reconstructions = _pair(originals, reconstructions, SMALLEST_FOR_SSIM)
    values = structural_similarity_index_measure(reconstructions, originals, data_range=1.0, reduction="none")
    return values.reshape(len(originals))


def open_lpips(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS, ≥ 0 and 0 for equal images (Zhang et al. 2018, version 0.1, in AlexNet's features), by torchmetrics; None
    where torchmetrics or the weights of torchvision's AlexNet, `lpips_weights()`, are not there: none are downloaded.

    What it returns raises UserError as `psnr` does, and for images below 31 pixels.
    """
    if not lpips_weights().is_file():
        return None
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError:
        return None
    from torchvision.models import AlexNet_Weights

    download(AlexNet_Weights.DEFAULT.url)  # refuses what holds more than tensors, before torchvision unpickles it
    network = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).net.to(device)

    @torch.no_grad()
    def lpips(originals: Tensor, reconstructions: Tensor) -> Tensor:
        originals, reconstructions = _pair(originals, reconstructions, SMALLEST_FOR_LPIPS)
        pair = (x.expand(-1, 3, -1, -1).to(device) for x in (originals, reconstructions))
        return network(*pair, normalize=True).flatten().cpu()

    return lpips


def lpips_weights() -> Path:
    """Where `python -c 'import torchvision; torchvision.models.alexnet(weights="DEFAULT")'` puts AlexNet's weights."""
    from torchvision.models import AlexNet_Weights

    return cached(AlexNet_Weights.DEFAULT.url)


def _pair(originals: Tensor, reconstructions: Tensor, smallest: int = 1) -> tuple[Tensor, Tensor]:
    if originals.ndim != 4 or originals.shape != reconstructions.shape or not len(originals):
        raise UserError(f"originals {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)} must "
                        "be images (N, C, H, W), as many and as large")  # fmt: skip
    if min(originals.shape[-2:]) < smallest:
        raise UserError(f"images must be of at least {smallest} pixels a side for this measure, got "
                        f"{tuple(originals.shape[-2:])}")  # fmt: skip
    low, high = originals.min().item(), originals.max().item()
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise UserError(f"originals must be in [0, 1], got {low:.4g} to {high:.4g}")
    if not torch.isfinite(reconstructions).all():
        raise UserError("the reconstructions are not finite; the autoencoder's weights are damaged")
    return originals.float(), reconstructions.float().clamp(0, 1)
