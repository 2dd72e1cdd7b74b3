"""Log-likelihoods along the flow against a density that is known; the bound of a U-Net in pixel space."""

import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ldm.diffusion.mixture import two_in_the_plane
from ldm.diffusion.schedule import alphas_bar
from ldm.diffusion.sde import VariancePreserving
from ldm.diffusion.variational_bound import variational_bound
from ldm.errors import RunError, UserError
from ldm.evaluation.likelihood import bits_per_dim, log_likelihood
from ldm.training.randomness import generator

PROCESS = VariancePreserving(beta_max=40.0)  # ᾱ(1) = 2e-9: nothing of the data is left at t = 1
MIXTURE = two_in_the_plane()


def score(x, t):
    return MIXTURE.score(x, PROCESS.alpha_bar(t))


def test_of_a_mixture_is_exact():
    x = MIXTURE.sample(64, torch.Generator().manual_seed(1))
    error = (log_likelihood(PROCESS, score, x) - MIXTURE.log_density(x)).abs().max().item()
    print(f"largest error {error:.1e} nats")
    assert error <= 1e-3


def test_hutchinson_is_right_on_average():
    generator = torch.Generator().manual_seed(2)
    x = MIXTURE.sample(4, generator)
    probes = torch.randint(2, (256, 4, 2), generator=generator, dtype=torch.float64) * 2 - 1
    estimate = log_likelihood(PROCESS, score, x, tolerance=1e-4, probes=probes)
    assert (estimate - MIXTURE.log_density(x)).abs().max() < 0.1


def test_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(UserError, match="need SciPy; pip install"):
        log_likelihood(PROCESS, score, torch.zeros(1, 2, dtype=torch.float64))


def pixel_model(classes: int | None = None, variance: str = "fixed_small") -> tuple[UNet2DModel, DDPMScheduler]:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2 if variance == "learned_range" else 1, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet.eval(), DDPMScheduler(num_train_timesteps=20, variance_type=variance)


def greys(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_bits_per_dimension_are_the_variational_bound(variance, tmp_path):
    """Of a model as train_ldm.py leaves it, image by image, of whole grey levels; batch k has the noise of key k."""
    DDPMPipeline(*pixel_model(variance=variance)).save_pretrained(tmp_path)
    model = DDPMPipeline.from_pretrained(tmp_path)
    done = []
    found = bits_per_dim(model.unet, model.scheduler, greys(5), seed=7, batch_size=3, progress=done.append)
    assert done == [3, 5]
    x_0 = (greys(5) * 255).round() / 127.5 - 1
    expected = [
        variational_bound(
            lambda x, t: model.unet(x, t).sample,
            x_0[part],
            alphas_bar("linear", 20),
            "epsilon",
            generator(7, "bits per dimension", number),
            variance,
        )
        for number, part in enumerate((slice(0, 3), slice(3, 5)))
    ]
    torch.testing.assert_close(found.double(), torch.cat(expected).double(), rtol=1e-4, atol=0)


def test_bits_per_dimension_know_classes():
    unet, scheduler = pixel_model(classes=3)
    ones, twos = (bits_per_dim(unet, scheduler, greys(2), 0, torch.full((2,), label)) for label in (1, 2))
    assert (ones != twos).all()
    with pytest.raises(UserError, match="class_labels must be given"):
        bits_per_dim(unet, scheduler, greys(2), 0)


def test_refuses_images_that_the_model_does_not_draw():
    unet, scheduler = pixel_model()
    for images, message in (
        (torch.zeros(2, 3, 8, 8), r"draws images \(1, 8, 8\), .* got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 1, 16, 16), "no others have a likelihood"),
        (greys(2) - 1, r"images must be in \[0, 1\], got -"),
    ):
        with pytest.raises(UserError, match=message):
            bits_per_dim(unet, scheduler, images, seed=0)
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(RunError, match=r"the bound of image 0 .* not finite"):
        bits_per_dim(unet, scheduler, greys(2), seed=0)
