"""Variations of images, the ways between two, and text diffs."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor

from ldm.errors import UserError
from pipelines import LatentDiffusionPipeline, LatentDiffusionVariationPipeline

FAST = {"num_inference_steps": 3, "output_type": "np"}
PRIOR = {"prior_num_inference_steps": 2, "num_prior_samples": 1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def vary(family):
    return lambda *args, **settings: family["LatentDiffusionVariationPipeline"](*args, **FAST | settings).images


@pytest.fixture
def between(family):
    return lambda **settings: family["LatentDiffusionInterpolationPipeline"](**FAST | settings).images


@pytest.fixture
def text_diff(family):
    return lambda *args, **settings: family["LatentDiffusionTextDiffPipeline"](*args, **FAST | settings).images


# ---- variations ------------------------------------------------------------------------------------------------------


def test_the_image_matters_and_so_does_the_text_beside_it(vary, photos):
    one = vary(photos[0], generator=seeded())
    assert np.abs(one - vary(photos[1], generator=seeded())).max() > 1e-3
    assert np.abs(one - vary(photos[0], prompt="two dogs", generator=seeded())).max() > 1e-4


def test_embeddings_stand_in_for_the_image(vary, family, photos):
    embeds = family["LatentDiffusionVariationPipeline"].embed_images("image", photos)
    assert np.array_equal(vary(photos, generator=seeded()), vary(image_embeds=embeds, generator=seeded()))


def test_images_of_every_kind_are_read_alike(family, photos):
    pipe = family["LatentDiffusionVariationPipeline"]
    expected = pipe.embed_images("image", photos)
    pixels = VaeImageProcessor(vae_scale_factor=2).preprocess(photos)
    for kind in ([np.asarray(photo) for photo in photos], pixels, pixels / 2 + 0.5):
        torch.testing.assert_close(pipe.embed_images("image", kind), expected)


def test_an_image_tower_that_is_absent_is_told_of(pipe, photos):
    with pytest.raises(UserError, match="image tower, which this model lacks"):
        LatentDiffusionVariationPipeline.from_pipe(pipe)(photos[0])


def test_the_priors_embeddings_make_what_text_to_image_draws(family, vary):
    prior, text_to_image = family["LatentDiffusionPriorPipeline"], family["LatentDiffusionPipeline"]
    generator = seeded()
    embeds = prior("a cat", num_inference_steps=2, num_samples=1, generator=generator).image_embeds
    drawn = vary(prompt="a cat", image_embeds=embeds, generator=generator)
    assert np.abs(drawn - text_to_image("a cat", generator=seeded(), **FAST, **PRIOR).images).max() < 1e-5


def test_without_an_image_tower_it_says_so(pipe, photos):
    own = LatentDiffusionVariationPipeline.from_pipe(pipe)
    with pytest.raises(UserError, match="open a folder that holds image_encoder/ and image_processor/"):
        own(photos[0])


def test_the_tower_of_a_variant_is_found_and_put_beside_the_rest(family, tmp_path):
    family["LatentDiffusionVariationPipeline"].save_pretrained(tmp_path, variant="fp16")
    elsewhere = LatentDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16).to("meta")
    tower = LatentDiffusionVariationPipeline.from_pipe(elsewhere).image_encoder
    assert (tower.device.type, tower.dtype) == ("meta", torch.float16)


def test_the_bundled_models_tower_is_found(photos):
    text_to_image = LatentDiffusionPipeline.default()
    shared = LatentDiffusionVariationPipeline.from_pipe(text_to_image)
    opened = LatentDiffusionVariationPipeline.default()
    assert shared.unet is text_to_image.unet
    embeds = [own.embed_images("image", photos[0].resize((32, 32))) for own in (shared, opened)]
    torch.testing.assert_close(*embeds)
    assert embeds[0].shape == (1, text_to_image.prior.config.embedding_dim) and embeds[0].std() > 0


# ---- between two -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_ends_are_what_two_texts_draw_by_themselves(between, family, guidance_scale):
    prompts, settings = ["a cat", "two dogs"], {"guidance_scale": guidance_scale, **PRIOR}
    frames = between(prompt=prompts, num_frames=4, generator=[seeded(1), seeded(2)], **settings)
    assert len(frames) == 4
    for i, frame in ((0, frames[0]), (1, frames[-1])):
        alone = family["LatentDiffusionPipeline"](prompts[i], generator=seeded(1 + i), **FAST, **settings).images[0]
        assert np.abs(frame - alone).max() < 1e-4


def test_the_ends_are_the_variations_of_two_images(between, vary, photos):
    frames = between(image=photos, num_frames=3, generator=[seeded(1), seeded(2)])
    for i, frame in ((0, frames[0]), (1, frames[-1])):
        assert np.abs(frame - vary(photos[i], generator=seeded(1 + i))[0]).max() < 1e-4


def test_the_ends_hold_with_another_scale_of_noise(family, photos):
    between, vary = (
        type(family[name]).from_pipe(
            family[name], scheduler=EulerDiscreteScheduler.from_config(family[name].scheduler.config)
        )
        for name in ("LatentDiffusionInterpolationPipeline", "LatentDiffusionVariationPipeline")
    )
    frames = between(image=photos, num_frames=3, generator=[seeded(1), seeded(2)], **FAST).images
    for i, frame in ((0, frames[0]), (1, frames[-1])):
        assert np.abs(frame - vary(photos[i], generator=seeded(1 + i), **FAST).images[0]).max() < 1e-4


def test_frames_lie_between(between, photos):
    frames = between(image=photos, num_frames=5, generator=seeded())
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0).all() and steps.max() < np.abs(frames[-1] - frames[0]).mean()


def test_without_a_prior_the_tokens_alone_are_between(family, pipe_without_prior):
    own = type(family["LatentDiffusionInterpolationPipeline"]).from_pipe(pipe_without_prior)
    own.set_progress_bar_config(disable=True)
    frames = own(["a cat", "two dogs"], num_frames=3, generator=[seeded(1), seeded(2)], **FAST).images
    for i, frame in ((0, frames[0]), (1, frames[-1])):
        alone = pipe_without_prior(["a cat", "two dogs"][i], generator=seeded(1 + i), **FAST).images[0]
        assert np.abs(frame - alone).max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "a cat"}, "prompt holds 1 texts; give two"),
        ({"prompt": ["a", "b", "c"]}, "prompt holds 3 texts; give two"),
        ({"prompt": ["a", "b"], "num_frames": 1}, "num_frames is 1"),
        (
            {"prompt": ["a", "b"], "generator": [torch.Generator()] * 3},
            "is a list of 3; give one generator, or as many",
        ),
        ({"image_embeds": torch.zeros(3, 16)}, r"image_embeds has shape \(3, 16\)"),
    ],
)
def test_two_ends_are_needed(between, settings, message):
    with pytest.raises(UserError, match=message):
        between(**settings)


# ---- text diffs ------------------------------------------------------------------------------------------------------


def test_the_first_frame_is_the_variation_and_the_text_takes_over(text_diff, vary, photos):
    frames = text_diff(photos[0], "two dogs", num_frames=4, generator=seeded())
    assert np.abs(frames[0] - vary(photos[0], generator=seeded())[0]).max() < 1e-4
    away = np.abs(frames - frames[0]).mean(axis=(1, 2, 3))
    assert (np.diff(away) > 0).all()
    still = text_diff(photos[0], "two dogs", num_frames=2, largest_share=0.0, generator=seeded())
    assert np.abs(still[0] - still[1]).max() < 1e-5


def test_turned_all_the_way_the_image_is_forgotten(text_diff, photos, family):
    """But for the embedding's length."""
    pipe = family["LatentDiffusionTextDiffPipeline"]
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    for photo in photos:
        text_diff(photo, "two dogs", num_frames=2, largest_share=1.0, guidance_scale=1.0, num_inference_steps=1)
    hook.remove()
    last = [torch.nn.functional.normalize(labels[-1, :16], dim=0) for labels in seen]
    torch.testing.assert_close(*last)


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (("both", "a dog"), {}, "image holds 2 pictures; give one"),
        (("one", ["a", "b"]), {}, "hold 3 texts; give one each"),
        (("one", "a dog"), {"base_prompt": "a dog"}, "no direction"),
        (("one", "a dog"), {"largest_share": 1.5}, "largest_share is 1.5"),
    ],
)
def test_what_a_text_diff_needs(text_diff, photos, args, settings, message):
    with pytest.raises(UserError, match=message):
        text_diff(photos if args[0] == "both" else photos[0], args[1], **settings)
