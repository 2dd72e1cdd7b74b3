"""The pipeline's own behaviour. That its pictures are stock Diffusers' is in test_stock.py."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import UnCLIPScheduler

from ldm.errors import RunError, UserError
from pipelines import LatentDiffusionPipeline

FAST = {"num_inference_steps": 3, "prior_num_inference_steps": 3, "num_prior_samples": 1, "output_type": "np"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe, prompt="a cat", seed=0, **settings) -> np.ndarray:
    fast = {name: value for name, value in FAST.items() if pipe.prior is not None or "prior" not in name}
    return pipe(prompt, **{"generator": seeded(seed), **fast, **settings}).images


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prior_samples", [1, 2])
def test_a_batch_item_is_the_image_of_a_run_of_its_own(pipe, num_prior_samples):
    prompts = ["a cat", "two dogs"]
    settings = {"num_prior_samples": num_prior_samples, "eta": 1.0, "noise_level": 100}
    batch = draw(pipe, prompts, generator=[seeded(3), seeded(4)], **settings)
    for i, prompt in enumerate(prompts):
        assert np.abs(batch[i] - draw(pipe, prompt, seed=3 + i, **settings)[0]).max() < 1e-4


def test_images_of_one_prompt_are_those_of_its_repetition(pipe):
    two = draw(pipe, ["a cat", "a dog"], num_images_per_prompt=2)
    assert len(two) == 4
    assert np.abs(two - draw(pipe, ["a cat", "a cat", "a dog", "a dog"])).max() < 1e-4


def test_same_seed_same_image_other_seed_another(pipe):
    assert np.array_equal(draw(pipe), draw(pipe))
    assert np.abs(draw(pipe) - draw(pipe, seed=1)).max() > 1e-2


def test_the_text_matters(pipe):
    assert np.abs(draw(pipe) - draw(pipe, "a dog")).max() > 1e-3
    assert np.abs(draw(pipe) - draw(pipe, negative_prompt="a dog")).max() > 1e-4


def test_of_two_prior_samples_the_closer_to_the_text_is_kept(pipe):
    prompts = ["a cat", "a dog", "two dogs", "cats"]
    text = pipe._embed_for_prior(prompts, torch.device("cpu"))[0]

    def closeness(samples):
        embeds = pipe.sample_image_embeds(prompts, 1, 3, 1.0, samples, [seeded(i) for i in range(4)])
        return (embeds * text).sum(1), embeds

    one, first = closeness(1)
    two, best = closeness(2)
    many, _ = closeness(6)
    kept = (first == best).all(dim=1)
    assert torch.equal(two[kept], one[kept]) and (two[~kept] > one[~kept]).all()
    assert (many >= two).all() and (many > one).any()


def test_further_prior_samples_leave_the_rest_of_the_randomness_alone(pipe):
    """Given the same image embedding, the U-Net starts from the same noise however many samples the prior drew."""
    states = []
    for samples in (1, 3):
        generator = seeded()
        pipe.sample_image_embeds("a cat", 1, 3, 1.0, samples, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


# ---- guidance, inputs in place of drawn ones, callbacks --------------------------------------------------------------


def test_scale_1_ignores_the_negative_prompt(pipe):
    assert np.array_equal(draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=1.0, negative_prompt="two dogs"))


def test_guidance_in_an_interval_runs_the_network_twice_there_alone(pipe):
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4}
    whole, never = draw(pipe, **settings), draw(pipe, **settings | {"guidance_scale": 1.0})
    assert np.array_equal(draw(pipe, **settings, guidance_interval=(0.0, 1.0)), whole)
    assert np.abs(draw(pipe, **settings, guidance_interval=(0.0, 0.0)) - never).max() < 1e-5
    batches.clear()
    levels = (1 - pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]).sqrt()
    part = draw(pipe, **settings, guidance_interval=(0.0, levels[1].item()))
    hook.remove()
    assert batches == [1, 2, 2, 2]
    assert np.abs(part - whole).max() > 1e-4 and np.abs(part - never).max() > 1e-4


def test_rescaled_guidance_is_tamer(pipe):
    settings = {"guidance_scale": 30.0, "output_type": "latent"}
    spread = [draw(pipe, **settings, guidance_rescale=share).std() for share in (0.0, 0.5, 1.0)]
    assert spread[0] > spread[1] > spread[2]


def test_tokens_and_image_embeddings_stand_in_for_the_text(pipe):
    from_text = draw(pipe, noise_level=0, guidance_scale=2.0)
    generator = seeded()
    image_embeds = pipe.sample_image_embeds("a cat", 1, 3, 4.0, 1, generator)
    prompt_embeds, negative_prompt_embeds, _ = pipe.encode_prompt("a cat", torch.device("cpu"))
    given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    from_tensors = draw(
        pipe, None, generator=generator, noise_level=0, guidance_scale=2.0, image_embeds=image_embeds, **given
    )
    assert np.abs(from_text - from_tensors).max() < 1e-5


def test_without_a_prior_tokens_alone_suffice(pipe_without_prior):
    pipe = pipe_without_prior
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt("a cat", torch.device("cpu"), negative_prompt="a dog")
    given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    assert np.abs(draw(pipe, None, **given) - draw(pipe, negative_prompt="a dog")).max() < 1e-6


def test_given_latents_are_where_the_sampler_starts(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=seeded(9))
    image_embeds = torch.randn(1, 16, generator=seeded(8))
    given = {"latents": latents, "image_embeds": image_embeds, "noise_level": 0}
    assert np.array_equal(draw(pipe, **given), draw(pipe, **given))
    assert np.abs(draw(pipe, **given) - draw(pipe, image_embeds=image_embeds)).max() > 1e-2


def test_callbacks_see_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def zeros_at_the_end(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipeline.num_timesteps - 1 else {}

    latents = draw(
        pipe,
        output_type="latent",
        callback_on_step_end=zeros_at_the_end,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert all(names == ["latents", "prompt_embeds"] for _, _, names in seen)
    assert not latents.any()


def test_a_callback_may_change_the_guidance(pipe):
    def more(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    guided = draw(pipe, guidance_scale=2.0)
    assert np.abs(draw(pipe, guidance_scale=2.0, callback_on_step_end=more) - guided).max() > 1e-5
    assert pipe.guidance_scale == 5.0


def test_output_types_agree(pipe):
    latents = draw(pipe, output_type="latent")
    array = draw(pipe)
    pixels = draw(pipe, output_type="pt")
    picture = draw(pipe, output_type="pil")[0]
    assert latents.shape == (1, 4, 8, 8) and array.shape == (1, 16, 16, 3) and pixels.shape == (1, 3, 16, 16)
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), array)
    assert np.abs(np.asarray(picture) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(pipe("a cat", generator=seeded(), return_dict=False, **FAST)[0], array)


def test_other_sizes(pipe):
    assert draw(pipe, height=20, width=28).shape == (1, 20, 28, 3)


# ---- saving and opening ----------------------------------------------------------------------------------------------


def test_saved_and_opened_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    for name in ("unet", "vae", "prior", "text_encoder"):
        once, weights = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert once.keys() == weights.keys() and all(torch.equal(once[key], weights[key]) for key in once)
    assert np.abs(draw(pipe) - draw(again)).max() < 1e-5  # where weights lie in memory decides their sums' rounding
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "model/model_index.json").read_text() == (tmp_path / "again/model_index.json").read_text()
    assert str(tmp_path) not in (tmp_path / "again/model_index.json").read_text()


def test_settings_travel_with_the_model(pipe, tmp_path):
    own = LatentDiffusionPipeline(**pipe.components)
    own.default_settings = {"num_inference_steps": 2, "prior_num_inference_steps": 3, "guidance_scale": 1.5}
    own.save_pretrained(tmp_path / "model")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    again.set_progress_bar_config(disable=True)
    assert again.default_settings == own.default_settings
    assert again.default_settings["prior_guidance_scale"] == 4.0
    again("a cat", output_type="np")
    assert again.guidance_scale == 1.5 and again.num_timesteps == 2
    again.default_settings = {"guidance_scale": 2.0}
    again.save_config(tmp_path / "model")  # the settings alone
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "model").default_settings["guidance_scale"] == 2.0
    with pytest.raises(UserError, match="unknown setting 'steps'"):
        own.default_settings = {"steps": 3}
    with pytest.raises(UserError, match=r"guidance_interval is .* it must be two numbers"):
        own.default_settings = {"guidance_interval": 0.5}


def test_a_folder_of_half_precision_computes_in_single(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").glob("*/config.json"):
        assert json.loads(file.read_text()).get("dtype", "float32") == "float32"
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", dtype=torch.float16)
    assert again.unet.dtype == again.text_encoder.dtype == torch.float16
    again.save_pretrained(tmp_path / "half")
    single = LatentDiffusionPipeline.from_pretrained(tmp_path / "half")
    single.set_progress_bar_config(disable=True)
    assert {part.dtype for part in single.components.values() if hasattr(part, "dtype")} == {torch.float32}
    assert np.abs(draw(single) - draw(pipe)).max() < 0.05


def test_components_are_the_arguments(pipe):
    again = LatentDiffusionPipeline(**pipe.components)
    assert all(again.components[name] is part for name, part in pipe.components.items())


# ---- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "prompt '' is empty"),
        ({"prompt": "  \n"}, "is empty"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a cat", 3]}, "prompt must be a text or a list of texts, not int"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"prompt": "a \udc80 cat"}, "not valid Unicode"),
        ({"negative_prompt": 3}, "negative_prompt must be a text"),
        (
            {"negative_prompt": ["a", "b"]},
            "negative_prompt holds 2 texts; give one for all prompts, or as many as prompts, 1",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be a whole number from 1 to 1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"prior_num_inference_steps": -1}, "prior_num_inference_steps is -1"),
        ({"prior_num_inference_steps": 101}, "prior_num_inference_steps is 101; it must be a whole number from 1 to"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001; it must be a whole number from 1 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"prior_guidance_scale": float("nan")}, "prior_guidance_scale is nan"),
        ({"num_prior_samples": 0}, "num_prior_samples is 0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; it must be a number from 0 to 1"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval is (0.5, 0.2); it must be two numbers from 0 to 1"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"height": 17}, "height is 17; it must be a multiple of the autoencoder's factor 2; the nearest is 16"),
        ({"width": 0}, "width is 0"),
        ({"noise_level": -1}, "noise_level is -1; it must be a whole number from 0 to 999"),
        ({"noise_level": 1000}, "noise_level is 1000"),
        ({"latents": torch.zeros(1, 4, 4, 8)}, "latents has shape (1, 4, 4, 8); these settings need (1, 4, 8, 8)"),
        ({"prior_latents": torch.zeros(1, 4)}, "prior_latents has shape (1, 4)"),
        ({"image_embeds": torch.zeros(1, 4)}, "image_embeds has shape (1, 4)"),
        ({"generator": [seeded(), seeded()]}, "generator is a list of 2; give one generator, or as many as images, 1"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "names 'noise'"),
    ],
)
def test_bad_input_is_one_line(pipe, settings, message):
    with pytest.raises(UserError) as caught:
        pipe(**{"prompt": "a cat", **FAST, **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unclip_scheduler_is_warned_of(pipe, tmp_path):
    own = LatentDiffusionPipeline(**pipe.components)
    own.prior_scheduler = UnCLIPScheduler(prediction_type="sample", num_train_timesteps=100)
    own.set_progress_bar_config(disable=True)
    assert draw(own).std() > 0.01
    with pytest.warns(UserWarning, match="DDPMScheduler.from_config"):
        own.save_config(tmp_path)
    with pytest.raises(UserError, match="prior_num_inference_steps is 1; it must be a whole number from 2 to 100"):
        draw(own, prior_num_inference_steps=1)


def test_tokens_alone_cannot_guide_a_prior(pipe):
    with pytest.raises(UserError, match="give image_embeds too"):
        pipe(prompt_embeds=torch.zeros(1, 12, 16), **FAST)


def test_a_unet_that_tells_no_size_wants_one(pipe):
    own = LatentDiffusionPipeline(**pipe.components | {"unet": copy.deepcopy(pipe.unet)})
    own.unet.register_to_config(sample_size=None)
    own.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="height and width are needed"):
        draw(own, width=16)
    assert draw(own, height=16, width=32).shape == (1, 16, 32, 3)


def test_a_unet_that_is_not_told_sizes_refuses_them(pipe):
    with pytest.raises(UserError, match="crops_coords_top_left: this U-Net was not trained with size_conditioning"):
        pipe("cat", crops_coords_top_left=(0, 0), **FAST)


def test_a_prompt_beyond_the_context_says_what_is_cut(pipe):
    with pytest.warns(UserWarning, match="prompt is beyond the 12 tokens.*not read: 'dog two cats'") as caught:
        long = draw(pipe, "cat cat cat cat cat cat cat cat cat cat dog two cats")
    assert len(caught) == 1
    assert np.array_equal(long, draw(pipe, "cat cat cat cat cat cat cat cat cat cat"))


def test_an_image_that_is_not_finite_is_an_error(pipe, tmp_path):
    with pytest.raises(RunError, match="not finite"):
        draw(pipe, latents=torch.full((1, 4, 8, 8), float("nan")))


def test_a_missing_component_is_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/unet")
    with pytest.raises(UserError, match="component 'unet' missing: expected"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "model")


def test_a_folder_of_another_kind_is_told(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(UserError, match="is a DDPMPipeline without 'vae'"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_a_unet_of_image_embeddings_needs_a_prior(pipe, pipe_without_prior):
    own = LatentDiffusionPipeline(**pipe_without_prior.components | {"unet": pipe.unet})
    with pytest.raises(UserError, match="only beside a prior"):
        draw(own)
