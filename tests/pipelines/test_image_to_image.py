import numpy as np
import pytest
import torch
from PIL import Image

FAST = {"num_inference_steps": 5, "prior_num_inference_steps": 2, "output_type": "np"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def draw(family, photos):
    def drawn(**settings):
        settings = {"prompt": "a cat", "image": photos[0], "generator": seeded(), **FAST, **settings}
        return family["LatentDiffusionImg2ImgPipeline"](**settings).images

    return drawn


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_without_a_step_the_image_comes_back_from_the_autoencoder(draw, family, photos, strength):
    pipe = family["LatentDiffusionImg2ImgPipeline"]
    pixels = pipe.image_processor.preprocess(photos[0])
    generator = seeded()
    pipe.sample_image_embeds("a cat", 1, 2, generator=generator)
    torch.randn(1, 16, generator=generator)  # the embedding's noise
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.sample(generator)
        expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(draw(strength=strength) - expected).max() < 1e-5
    assert pipe.num_timesteps == 0


def test_at_full_strength_it_is_text_to_image(draw, family, photos):
    expected = family["LatentDiffusionPipeline"]("a cat", generator=seeded(), **FAST).images
    assert np.array_equal(draw(strength=1.0), expected)
    assert np.array_equal(draw(strength=1.0, image=photos[1]), expected)


def test_steps_are_its_share(draw, family):
    for strength, steps in ((0.2, 1), (0.5, 2), (0.8, 4), (1.0, 5)):
        draw(strength=strength)
        assert family["LatentDiffusionImg2ImgPipeline"].num_timesteps == steps


def test_the_image_matters_less_the_stronger(draw, photos):
    apart = [
        np.abs(draw(strength=strength) - draw(strength=strength, image=photos[1])).mean() for strength in (0.2, 0.6, 1)
    ]
    assert apart[0] > apart[1] > apart[2] == 0


def test_its_size_is_the_images_or_what_is_asked_for(draw):
    assert draw(image=Image.new("RGB", (21, 27))).shape == (1, 26, 20, 3)
    assert draw(height=24, width=20).shape == (1, 24, 20, 3)


def test_each_prompt_has_its_image(draw, photos):
    both = draw(prompt=["a cat", "a cat"], image=photos, generator=[seeded(), seeded()])
    for i in range(2):
        assert np.abs(both[i] - draw(image=photos[i])[0]).max() < 1e-4
