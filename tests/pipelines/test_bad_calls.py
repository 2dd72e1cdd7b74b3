"""Whatever a pipeline is called with, it draws, or says in one line what is wrong."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDXLCFGCutoffCallback
from PIL import Image

import pipelines
from ldm.errors import UserError

VARIATION = "LatentDiffusionVariationPipeline"
TEXT_DIFF = "LatentDiffusionTextDiffPipeline"
INTERPOLATION = "LatentDiffusionInterpolationPipeline"
REDRAWING = ("LatentDiffusionImg2ImgPipeline", "LatentDiffusionInpaintPipeline")
DRAWN = {
    "emoji": "a 🐈 and a 🐕‍🦺",
    "right to left": "قطة وכלב",
    "null": "a \0 cat",
    "controls": "a\x1b[31m cat\u202e",
    "10,000 characters": "cat dog " * 1250,
}
REFUSED = {
    "empty": ("", "prompt '' is empty"),
    "spaces": (" \t\n", "is empty"),
    "100,001 characters": ("a" * 100_001, "has 100001 characters; give at most 100000"),
    "surrogate": ("a \ud800 cat", "not valid Unicode"),
    "bytes": (b"a cat", "prompt must be a text or a list of texts, not bytes"),
    "none of them": ([], "prompt is an empty list"),
    "mixed": (["a cat", 3], "must be a text or a list of texts, not int"),
    "mixed with None": (["a cat", None], "must be a text or a list of texts, not NoneType"),
    "number": (7, "must be a text or a list of texts, not int"),
}
NAN, INF = float("nan"), float("inf")
SETTINGS = [
    ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be a whole number from 1"),
    ({"num_inference_steps": -1}, "num_inference_steps is -1"),
    ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
    ({"num_inference_steps": "2"}, "num_inference_steps is '2'"),
    ({"num_inference_steps": 10**9}, "num_inference_steps is 1000000000"),
    ({"prior_num_inference_steps": 0}, "prior_num_inference_steps is 0"),
    ({"prior_guidance_scale": NAN, "image_embeds": torch.zeros(1, 16)}, "prior_guidance_scale is nan"),
    ({"prior_latents": torch.zeros(1, 16), "image_embeds": torch.zeros(1, 16)}, "prior_latents belongs to the prior"),
    ({"num_prior_samples": 10**9}, "num_prior_samples is 1000000000; it must be a whole number from 1 to 1000"),
    ({"num_samples": 10**9}, "num_samples is 1000000000; it must be a whole number from 1 to 1000"),
    ({"guidance_scale": NAN}, "guidance_scale is nan"),
    ({"guidance_scale": INF}, "guidance_scale is inf"),
    ({"guidance_scale": -1}, "guidance_scale is -1"),
    ({"guidance_scale": "3"}, "guidance_scale is '3'"),
    ({"guidance_rescale": 2}, "guidance_rescale is 2"),
    ({"guidance_interval": (0, NAN)}, "guidance_interval is (0, nan)"),
    ({"eta": -0.1}, "eta is -0.1"),
    ({"eta": NAN}, "eta is nan"),
    ({"height": 0}, "height is 0; it must be a multiple of the autoencoder's factor 2; the nearest is 2"),
    ({"height": -8}, "height is -8; it must be a multiple of the autoencoder's factor 2; the nearest is 2"),
    ({"width": 17}, "width is 17; it must be a multiple of the autoencoder's factor 2; the nearest is 16"),
    ({"width": 1_000_000}, "width is 1000000; it must be a multiple of the autoencoder's factor 2, at most 8192; "
     "the nearest is 8192"),
    ({"width": 1e6}, "the nearest is 8192"),
    ({"height": "16"}, "height is '16'; it must be a whole number of pixels"),
    ({"height": NAN}, "height is nan; it must be a whole number of pixels"),
    ({"latents": torch.zeros(1, 4, 3, 3)}, "atents has shape (1, 4, 3, 3); these settings need"),
    ({"latents": [0.0]}, "atents is a list; it must be a tensor"),
    ({"latents": np.zeros((1, 4, 8, 8))}, "atents is a ndarray; it must be a tensor"),
    ({"prior_latents": torch.zeros(2, 2)}, "prior_latents has shape (2, 2)"),
    ({"image_embeds": torch.zeros(1, 3), "image": None}, "image_embeds has shape (1, 3)"),
    ({"image_embeds": [[0.0]], "image": None}, "image_embeds is a list"),
    ({"prompt_embeds": torch.zeros(1, 12, 3), "prompt": None, "image_embeds": torch.zeros(1, 16)}, ""),
    ({"prompt_embeds": "a cat", "prompt": None}, "prompt_embeds is a str"),
    ({"noise_level": -1}, "noise_level is -1; it must be a whole number from 0 to 999"),
    ({"noise_level": 1000}, "noise_level is 1000"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
    ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000; "),
    ({"num_frames": 1}, "num_frames is 1; it must be a whole number >= 2"),
    ({"num_frames": 10**9}, "num_frames is 1000000000; pictures of 16×16 pixels are made together, at most 10000"),
    ({"strength": -0.1}, "strength is -0.1; it must be a number from 0 to 1"),
    ({"strength": 1.1}, "strength is 1.1"),
    ({"strength": NAN}, "strength is nan"),
    ({"strength": "1"}, "strength is '1'"),
    ({"largest_share": 7}, "largest_share is 7"),
    ({"negative_prompt": b"no"}, "negative_prompt must be a text"),
    ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt holds 3 texts; give one for all prompts, or as many"),
    ({"generator": 0}, "generator holds a int (0); give torch.Generator()"),
    ({"generator": [torch.Generator(), None]}, "generator holds a NoneType"),
    ({"generator": [torch.Generator()] * 5}, "generator is a list of 5; give one generator, or as many as images, "),
    ({"output_type": "jpeg"}, "output_type is 'jpeg'; it must be one of"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "names 'noise'; there are latents"),
    ({"callback_on_step_end": SDXLCFGCutoffCallback(0.5)}, "names 'add_text_embeds'; there are"),
    ({"callback_on_step_end": 3}, "callback_on_step_end is a int; give a function"),
    ({"cross_attention_kwargs": 3}, "cross_attention_kwargs is a int"),
    ({"image": "photo.png"}, "image is of str; give a PIL image, an array, a tensor"),
    ({"image": []}, "image is an empty list"),
    ({"image": [Image.new("RGB", (16, 16)), np.zeros((16, 16, 3))]}, "image is of Image and ndarray"),
    ({"image": [Image.new("RGB", (16, 16)), Image.new("RGB", (8, 16))]}, "image holds pictures of several sizes"),
    ({"image": Image.new("RGB", (0, 16))}, "image holds a picture of size (0, 16), without a pixel"),
    ({"image": np.zeros((16, 16))}, "image has shape (16, 16); it must be (H, W, 3)"),
    ({"image": np.zeros((16, 16, 4))}, "image has 4 channels; give 3"),
    ({"image": torch.zeros(16, 16, 3)}, "image has 16 channels; give 3"),
    ({"image": torch.zeros(3, 0, 16)}, "image holds a picture of size (3, 0, 16)"),
    ({"image": torch.full((3, 16, 16), 7.0)}, "image has values from 7 to 7; give [0, 1]"),
    ({"image": torch.full((3, 16, 16), NAN)}, "image has values from nan to nan"),
    ({"image": np.full((16, 16, 3), "x")}, "image is an array of <U1"),
    ({"mask_image": None}, "mask_image is of NoneType"),
    ({"mask_image": Image.new("L", (8, 16))}, "mask_image is 8×16 pixels, image 16×16; give them one size"),
    ({"mask_image": np.zeros((16, 16, 3))}, "mask_image"),
    ({"mask_image": torch.zeros(3, 16, 16)}, "mask_image holds 3 pictures; give one for all"),
    ({"mask_image": torch.full((16, 16), -1.0)}, "mask_image has values down to -1; give 0, kept, to 1, painted"),
    ({"mask_image": torch.zeros(16)}, "mask_image has shape"),
    ({"num_inference_step": 3}, "unknown argument 'num_inference_step'; did you mean 'num_inference_steps'?"),
    ({"zzz": 3}, "unknown argument 'zzz'; there are"),
]  # fmt: skip


ARGUMENTS = {name: inspect.signature(getattr(pipelines, name).__call__).parameters for name in pipelines.__all__}
ALL = {key for arguments in ARGUMENTS.values() for key in arguments}
FIVE = [Image.new("RGB", (16, 16))] * 5
IMAGES = [
    *((name, None, "image is of NoneType; give") for name in REDRAWING),
    *((name, None, "give either image or image_embeds") for name in (VARIATION, TEXT_DIFF)),
    *((name, FIVE, "image holds 5 pictures") for name in (*REDRAWING, INTERPOLATION, TEXT_DIFF)),
]


@pytest.fixture
def call(family, photos, mask):
    def called(name, **settings):
        good = {
            "prompt": ["a cat", "a dog"] if name == INTERPOLATION else "a cat",
            "image": photos[0],
            "mask_image": mask,
            "num_inference_steps": 2,
            "prior_num_inference_steps": 2,
            "num_frames": 2,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "np",
        }
        if name == INTERPOLATION:
            del good["image"]
        good = {key: value for key, value in good.items() if key in ARGUMENTS[name]}
        return next(iter(family[name](**good | settings).values()))

    return called


@pytest.mark.parametrize("name", pipelines.__all__)
@pytest.mark.parametrize("prompt", DRAWN.values(), ids=DRAWN)
def test_unusual_prompts_are_drawn(call, name, prompt):
    prompt = ["a dog", prompt] if name == INTERPOLATION else prompt
    if name == TEXT_DIFF:
        prompt = f"a dog {prompt}"  # not of unknown letters alone, from which nothing can differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(call(name, prompt=prompt)).all()


@pytest.mark.parametrize("name", pipelines.__all__)
def test_what_is_cut_is_said(call, name):
    prompt = ["a dog", DRAWN["10,000 characters"]] if name == INTERPOLATION else DRAWN["10,000 characters"]
    with pytest.warns(
        UserWarning, match="prompt is beyond the 12 tokens.*not read: 'cat dog.*, 99.. characters"
    ) as caught:
        call(name, prompt=prompt)
    assert len(caught) == 1 and len(str(caught[0].message)) < 400


@pytest.mark.parametrize("name", pipelines.__all__)
@pytest.mark.parametrize(("prompt", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_prompt_is_refused(call, name, prompt, message):
    with pytest.raises(UserError) as caught:
        call(name, prompt=prompt)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", pipelines.__all__)
def test_no_prompt_at_all(call, name):
    if name == VARIATION:
        assert np.isfinite(call(name, prompt=None)).all()  # the image says it all
    else:
        with pytest.raises(UserError, match="prompt"):
            call(name, prompt=None)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (name, settings, message)
        for name in pipelines.__all__
        for settings, message in SETTINGS
        if next(iter(settings)) in ARGUMENTS[name] or next(iter(settings)) not in ALL
    ],
)
def test_bad_settings_are_one_line(call, name, settings, message):
    if "image_embeds" in settings and name in REDRAWING:
        settings = {key: value for key, value in settings.items() if key != "image"}  # they read it besides
    settings = {key: value for key, value in settings.items() if key in ARGUMENTS[name] or key not in ALL}
    with pytest.raises(UserError) as caught:
        call(name, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "image", "message"), IMAGES)
def test_images_are_as_many_as_needed(call, name, image, message):
    with pytest.raises(UserError) as caught:
        call(name, image=image)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"prior_num_inference_steps": 2},
        {"prior_guidance_scale": 1.0},
        {"num_prior_samples": 1},
        {"prior_latents": torch.zeros(1, 16)},
        {"prior_prompt_embeds": ()},
        {"noise_level": 0},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_no_part_of_a_model_reads_is_refused(pipe_without_prior, given):
    remedy = "reads no image embedding" if "noise_level" in given else "this model has no prior"
    with pytest.raises(UserError, match=f"{next(iter(given))}: .*{remedy}; leave it out"):
        pipe_without_prior("a cat", **given)


def test_generators_are_as_many_as_the_embeddings_that_a_read_prompt_gives(family):
    prior = family["LatentDiffusionPriorPipeline"]
    read = prior.encode_prompt(["a cat", "a dog"], torch.device("cpu"))[2]
    with pytest.raises(UserError, match="generator is a list of 3; give one generator, or as many as images, 4"):
        prior(prior_prompt_embeds=read, num_images_per_prompt=2, generator=[torch.Generator()] * 3)
