"""PSNR, SSIM and LPIPS of reconstructions that are known; against torchmetrics' in test_against_others.py."""

import math
import sys

import pytest
import torch

from ldm.errors import UserError
from ldm.evaluation.reconstruction import lpips_weights, open_lpips, psnr, ssim


def images(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_psnr_of_a_known_error():
    x = images() * 0.5
    found = psnr(x, x + torch.tensor([0.1, 0.01, 0.0])[:, None, None, None])
    assert found.tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    assert psnr(x, x + 5).tolist() == psnr(x, torch.ones_like(x)).tolist()  # a picture knows no more than white


def test_ssim_falls_with_noise_and_is_one_for_equal_images():
    x = images(2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-5)
    little, much = (ssim(x, x + scale * noise) for scale in (0.05, 0.5))
    assert (much < little).all() and (little < 1).all() and little.shape == (2,)


def test_ssim_of_flat_images_by_hand():
    """Without variance only the luminance is left: (2 a b + c) / (a² + b² + c), c = 0.01²."""
    a, b = torch.full((1, 1, 16, 16), 0.25), torch.full((1, 1, 16, 16), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-3)


def test_without_torchmetrics_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(UserError, match=r'pip install "ldm\[evaluation\]"'):
        ssim(images(), images())
    assert math.isfinite(psnr(images(), images() / 2).mean())


def test_no_lpips_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert lpips_weights() == tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    assert open_lpips() is None
    lpips_weights().parent.mkdir(parents=True)
    lpips_weights().write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79.pth' is damaged .* delete it"):
        open_lpips()


def test_lpips_of_a_network_of_any_weights(monkeypatch, tmp_path):
    """AlexNet's own are not here: with others, of the same shapes, LPIPS is still 0 for equal images alone."""
    import torchvision

    torch.manual_seed(0)
    state = torchvision.models.alexnet(weights=None).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: state)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: state)
    lpips_weights().parent.mkdir(parents=True)
    lpips_weights().touch()
    lpips, x = open_lpips(), images(2, 32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert lpips(x, x).tolist() == [0, 0]
    little, much = (lpips(x, x + scale * noise) for scale in (0.05, 0.5))
    assert (little > 0).all() and (little < much).all() and little.shape == (2,)
    assert lpips(x[:, :1], x[:, :1]).tolist() == [0, 0]  # of greys, too
    with pytest.raises(UserError, match="at least 31 pixels"):
        lpips(images(), images())


@pytest.mark.parametrize(
    ("originals", "reconstructions", "message"),
    [
        (images(), images(2), "as many and as large"),
        (images(3, 8), images(3, 8), "at least 11 pixels a side"),
        (images() * 2 - 1, images(), r"originals must be in \[0, 1\], got -"),
        (images(), images() / 0, "reconstructions are not finite"),
    ],
)
def test_refuses_in_one_line(originals, reconstructions, message):
    with pytest.raises(UserError, match=message) as refusal:
        ssim(originals, reconstructions)
    assert "\n" not in str(refusal.value)
