"""First-stage losses and statistics against closed forms."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from ldm.autoencoders import kl
from ldm.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from ldm.config import AutoencoderConfig, DataConfig
from ldm.errors import UserError


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    ).eval()


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).mean()
    assert kl.kl_divergence(mean, logvar).item() == pytest.approx(expected.item(), rel=1e-12)


def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 8, 8)
    assert kl.psnr(x + 0.2, x).item() == pytest.approx(10 * math.log10(4 / 0.04), rel=1e-5)


def test_reconstruction_is_encode_sample_decode(vae):
    x, noise = torch.randn(2, 3, 16, 16), torch.randn(2, *kl.latent_shape(vae, 16))
    x_hat, mean, logvar = kl.Reconstruction(vae)(x, noise)
    z = mean + (logvar / 2).exp() * noise
    torch.testing.assert_close(x_hat, vae.decode(z).sample)
    assert z.shape == (2, 3, 8, 8)


def test_statistics_of_known_gaussians():
    torch.manual_seed(0)
    scale, shift = torch.tensor([1.0, 2.0, 0.05]).view(3, 1, 1), torch.tensor([0.0, -3.0, 5.0]).view(3, 1, 1)
    means = torch.randn(400, 3, 16, 16) * scale + shift
    logvar = torch.full_like(means, math.log(0.09))
    found = kl.latent_statistics(zip(means.split(64), logvar.split(64), strict=True))
    torch.testing.assert_close(found.mean, shift.flatten(), atol=0.02, rtol=0)
    assert found.std == pytest.approx(math.sqrt((1 + 4 + 0.0025) / 3 + 0.09), rel=0.01)
    assert found.active_channels == 2  # the third varies by 0.05² < 0.01


@torch.no_grad()
def test_standardising_keeps_reconstructions_and_centres_latents(vae):
    x = torch.randn(16, 3, 16, 16)
    before = vae.decode(vae.encode(x).latent_dist.mean).sample
    posterior = vae.encode(x).latent_dist
    statistics = kl.latent_statistics([(posterior.mean, posterior.logvar)])
    kl.standardise(vae, statistics)
    torch.testing.assert_close(vae.decode(vae.encode(x).latent_dist.mean).sample, before, atol=1e-5, rtol=1e-4)
    after = vae.encode(x).latent_dist
    again = kl.latent_statistics([(after.mean * vae.config.scaling_factor, after.logvar)])
    assert again.mean.abs().max() < 1e-5
    samples = after.sample(torch.Generator().manual_seed(0)) * vae.config.scaling_factor
    assert samples.std().item() == pytest.approx(1.0, rel=0.05)


def test_hinge_loss_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert generator_loss(fake).item() == pytest.approx(0.75)


def test_adaptive_weight_balances_the_gradients():
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    weight = adaptive_weight((3 * w).sum(), (0.5 * w).sum(), w)
    assert weight.item() == pytest.approx(6.0, rel=1e-3) and not weight.requires_grad


def test_the_discriminator_judges_patches():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8)
    images = torch.randn(2, 3, 32, 32)
    logits = discriminator(images)
    assert logits.shape[:2] == (2, 1) and 1 < logits.shape[2] < 32
    for place, layer in enumerate(discriminator.layers):
        if isinstance(layer, torch.nn.GroupNorm):  # whose means are those of the whole image
            discriminator.layers[place] = torch.nn.Identity()
    logits = discriminator(images)
    images[:, :, :4, :4] += 1
    difference = (discriminator(images) - logits).abs()
    assert difference[..., 0, 0].min() > 0 and difference[..., -1, -1].max() == 0


@pytest.mark.parametrize(("layers", "side"), [(1, 6), (2, 12), (3, 24), (4, 48)])
def test_the_smallest_image_for_its_layers(layers, side):
    config = {"output_dir": "run", "adversarial_weight": 1, "discriminator_layers": layers}
    assert AutoencoderConfig(data=DataConfig(image_size=side), **config).discriminator_layers == layers
    assert PatchDiscriminator(4, layers)(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=f"must be <= {layers - 1} with data.image_size {side - 1}, got {layers}"):
        AutoencoderConfig(data=DataConfig(image_size=side - 1), **config)
    with pytest.raises(RuntimeError, match="Kernel size"):
        PatchDiscriminator(4, layers)(torch.zeros(1, 3, side - 1, side - 1))


@pytest.mark.parametrize("channels", [1, 6, 33])
def test_any_number_of_channels_makes_a_discriminator(channels):
    assert PatchDiscriminator(channels)(torch.randn(1, 3, 16, 16)).isfinite().all()
