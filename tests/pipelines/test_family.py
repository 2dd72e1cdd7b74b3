"""What every pipeline of the package must do to behave as Diffusers' own do."""

import copy
import inspect
import json
import re

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    StableUnCLIPPipeline,
    UniPCMultistepScheduler,
)

import pipelines
from ldm.errors import UserError

DRAWING = sorted(set(pipelines.__all__) - {"LatentDiffusionPriorPipeline"})
VARIATION, TEXT_DIFF = "LatentDiffusionVariationPipeline", "LatentDiffusionTextDiffPipeline"
BATCHED = sorted(set(DRAWING) - {"LatentDiffusionInterpolationPipeline", TEXT_DIFF})
PRIOR = {"prior_num_inference_steps": 2, "num_prior_samples": 1}
SCHEDULERS = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "kdpm2": (KDPM2DiscreteScheduler, {}),
    "dpm++ 2m karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++ sde karras": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def call(family, photos, mask):
    """(name, **settings) -> the result; `of` picks one of the two inputs of a batch, both if None."""

    def inputs(name, of, has_prior):
        prior = PRIOR if has_prior else {}
        prompts = ["a cat", "two dogs"]
        prompt, picture = (prompts, photos) if of is None else (prompts[of], photos[of])
        return {
            "LatentDiffusionPipeline": {"prompt": prompt, **prior},
            "LatentDiffusionImg2ImgPipeline": {"prompt": prompt, "image": picture, "strength": 0.7, **prior},
            "LatentDiffusionInpaintPipeline": {"prompt": prompt, "image": picture, "mask_image": mask, **prior},
            "LatentDiffusionVariationPipeline": {"image": picture},
            "LatentDiffusionInterpolationPipeline": {"prompt": prompts, "num_frames": 3, **prior},
            "LatentDiffusionTextDiffPipeline": {"image": photos[of or 0], "prompt": "a dog", "num_frames": 3},
            "LatentDiffusionPriorPipeline": {"prompt": prompt, "num_samples": 1},
        }[name]

    def called(name, of=0, pipe=None, **settings):
        general = {"num_inference_steps": 4, "generator": seeded()}
        if name != "LatentDiffusionPriorPipeline":
            general["output_type"] = "np"
        pipe = pipe or family[name]
        return pipe(**general | inputs(name, of, pipe.prior is not None) | settings)

    return called


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_item_is_the_image_of_a_run_of_its_own(call, name):
    settings = {"eta": 1.0, "noise_level": 100}
    batch = call(name, of=None, generator=[seeded(3), seeded(4)], **settings).images
    assert len(batch) == 2 and np.abs(batch[0] - batch[1]).max() > 1e-2
    for i in range(2):
        assert np.abs(batch[i] - call(name, of=i, generator=seeded(3 + i), **settings).images[0]).max() < 1e-4


def test_a_batch_item_of_the_prior_is_that_of_a_run_of_its_own(call):
    name = "LatentDiffusionPriorPipeline"
    batch = call(name, of=None, generator=[seeded(3), seeded(4)]).image_embeds
    for i in range(2):
        torch.testing.assert_close(batch[i : i + 1], call(name, of=i, generator=seeded(3 + i)).image_embeds)


@pytest.mark.parametrize("name", BATCHED)
def test_several_images_of_an_input_are_those_of_its_repetition(call, name):
    two = call(name, num_images_per_prompt=2, generator=[seeded(1), seeded(2)]).images
    assert len(two) == 2 and np.abs(two[0] - two[1]).max() > 1e-2
    for i in range(2):
        assert np.abs(two[i] - call(name, generator=seeded(1 + i)).images[0]).max() < 1e-4
    four = call(name, of=None, num_images_per_prompt=2, generator=[seeded(i) for i in (1, 2, 1, 2)]).images
    assert np.abs(four[:2] - two).max() < 1e-4 and np.abs(four[2:] - two).max() > 1e-2


@pytest.mark.parametrize("name", DRAWING)
def test_same_seed_same_image_other_seed_another(call, name):
    once = call(name).images
    assert np.array_equal(call(name).images, once)
    assert np.abs(call(name, generator=seeded(1)).images - once).max() > 1e-2


# ---- outputs and callbacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWING)
def test_output_types_agree_and_a_tuple_is_the_same(call, name):
    array = call(name).images
    assert np.array_equal(call(name, return_dict=False)[0], array)
    pixels = call(name, output_type="pt").images
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), array)
    images = call(name, output_type="pil").images
    assert np.abs(np.stack([np.asarray(image) for image in images]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    assert call(name, output_type="latent").images.shape == (len(array), 4, 8, 8)


def test_the_priors_outputs_agree(call):
    name = "LatentDiffusionPriorPipeline"
    output = call(name)
    embeds, negative = call(name, return_dict=False)
    assert torch.equal(embeds, output.image_embeds) and torch.equal(negative, output.negative_image_embeds)
    assert np.array_equal(call(name, output_type="np").image_embeds, embeds.numpy())
    assert embeds.shape == (1, 16) and not negative.any()


@pytest.mark.parametrize("name", DRAWING)
def test_callbacks_see_every_step_and_may_replace_the_latents(call, family, name):
    seen = []

    def zeros_at_the_end(pipeline, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        last = step == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else tensors

    latents = call(
        name,
        output_type="latent",
        callback_on_step_end=zeros_at_the_end,
        callback_on_step_end_tensor_inputs=family[name]._callback_tensor_inputs,
    ).images
    assert [step for step, _ in seen] == list(range(family[name].num_timesteps)) and len(seen) in (2, 4)
    assert all(names == ["image_embeds", "latents", "prompt_embeds"] for _, names in seen)
    assert not latents.any()


@pytest.mark.parametrize("name", DRAWING)
def test_a_callback_may_change_the_guidance(call, family, name):
    def more(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    guided = call(name, guidance_scale=2.0).images
    assert np.abs(call(name, guidance_scale=2.0, callback_on_step_end=more).images - guided).max() > 1e-5
    assert family[name].guidance_scale > 2


@pytest.mark.parametrize("name", DRAWING)
def test_a_callback_may_end_the_guidance(call, family, name):
    """At scales of 1 and less the U-Net runs once a step, on the condition alone."""
    samples, shown = [], []

    def end(pipeline, step, timestep, tensors):
        shown.append(list(tensors))
        pipeline._guidance_scale = 0.0
        return {}

    end.tensor_inputs = ["prompt_embeds"]  # as Diffusers' own callbacks say what they read
    hook = family[name].unet.register_forward_pre_hook(lambda _, args: samples.append(len(args[0])))
    try:
        images = call(name, guidance_scale=4.0, callback_on_step_end=end).images
    finally:
        hook.remove()
    assert samples[0] == 2 * len(images) and set(samples[1:]) == {len(images)}
    assert shown == [["prompt_embeds"]] * len(samples)


@pytest.mark.parametrize("name", DRAWING)
def test_guidance_is_rescaled_and_kept_to_its_interval(call, name):
    settings = {"guidance_scale": 8.0, "output_type": "latent"}
    whole, never = call(name, **settings).images, call(name, **settings | {"guidance_scale": 1.0}).images
    assert (call(name, **settings, guidance_rescale=0.7).images - whole).abs().max() > 1e-4
    assert (call(name, **settings, guidance_interval=(0.0, 0.0)).images - never).abs().max() < 1e-4
    assert (never - whole).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", DRAWING)
def test_any_scheduler_will_do(call, family, name, scheduler):
    kind, settings = SCHEDULERS[scheduler]
    pipe = type(family[name]).from_pipe(family[name])
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    images = call(name, pipe=pipe, guidance_interval=(0.1, 0.9)).images
    assert np.isfinite(images).all() and images.std() > 0.01
    steps = int(4 * 0.7) if name == "LatentDiffusionImg2ImgPipeline" else 4
    assert pipe.num_timesteps == (steps if pipe.scheduler.order == 1 else 2 * steps - 1)


GIVEN = {"height", "width", "guidance_scale", "negative_prompt", "cross_attention_kwargs"}
OPTIONAL = {"num_inference_steps", "generator", "output_type", "return_dict"}
PROMPTED = {"prompt", "prompt_embeds", "negative_prompt_embeds"}


@pytest.mark.parametrize("name", pipelines.__all__)
def test_arguments_are_those_of_stock_and_each_has_a_default(name):
    parameters = inspect.signature(getattr(pipelines, name).__call__).parameters
    wanted = OPTIONAL | (GIVEN if name in DRAWING else {"prompt", "guidance_scale", "latents"})
    wanted |= PROMPTED if name in set(DRAWING) - {TEXT_DIFF} else set()
    wanted |= {"num_images_per_prompt"} if name in BATCHED else set()
    wanted |= set() if name == "LatentDiffusionImg2ImgPipeline" else {"latents"}
    assert wanted <= set(parameters)
    assert all(
        parameter.default is not inspect.Parameter.empty for key, parameter in parameters.items() if key != "self"
    )


# ---- components ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pipelines.__all__)
def test_components_are_the_arguments_and_shared(family, pipe, name):
    own = family[name]
    assert set(own.components) == set(inspect.signature(type(own).__init__).parameters) - {"self"}
    assert all(own.components[part] is component for part, component in pipe.components.items())
    assert set(own._optional_components) <= set(own.components)


@pytest.mark.parametrize("name", pipelines.__all__)
def test_saved_and_opened_is_the_same_and_stock_opens_it(call, family, name, tmp_path):
    family[name].save_pretrained(tmp_path)
    again = type(family[name]).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert [part is None for part in again.components.values()] == [
        part is None for part in family[name].components.values()
    ]
    once, twice = call(name), call(name, pipe=again)
    key = next(iter(once))
    assert np.abs(np.asarray(once[key]) - np.asarray(twice[key])).max() < 1e-4
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPPipeline" and "feature_extractor" not in index
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is StableUnCLIPPipeline


@pytest.mark.parametrize("name", sorted(set(DRAWING) - {VARIATION, TEXT_DIFF}))
def test_the_optional_components_may_be_absent(call, family, pipe_without_prior, name, tmp_path):
    own = type(family[name]).from_pipe(pipe_without_prior)
    own.set_progress_bar_config(disable=True)
    assert all(getattr(own, part) is None for part in own._optional_components)
    own.save_pretrained(tmp_path)
    again = type(own).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert all(getattr(again, part) is None for part in own._optional_components)
    assert np.abs(call(name, pipe=own).images - call(name, pipe=again).images).max() < 1e-4


@pytest.mark.parametrize("name", [VARIATION, TEXT_DIFF, "LatentDiffusionPriorPipeline"])
def test_what_is_needed_of_them_is_said(call, family, pipe_without_prior, name):
    own = type(family[name]).from_pipe(pipe_without_prior)
    with pytest.raises(UserError, match=r"captions alone guide this model's U-Net|this model has no prior"):
        call(name, pipe=own)


def test_a_scheduler_of_another_kind_is_named(call, family):
    own = type(family["LatentDiffusionPipeline"]).from_pipe(family["LatentDiffusionPipeline"])
    own.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="scheduler is a FlowMatchEulerDiscreteScheduler; take one of"):
        call("LatentDiffusionPipeline", pipe=own)
    own.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="guidance_interval needs to know the share of noise"):
        call("LatentDiffusionPipeline", pipe=own, guidance_interval=(0.1, 0.5))


TEXTS = ("text_encoder", "tokenizer", "prior_text_encoder", "prior_tokenizer")
READING = sorted(set(pipelines.__all__) - {VARIATION, TEXT_DIFF})


@pytest.mark.parametrize("name", READING)
def test_texts_are_read_without_the_rest_and_pictures_drawn_without_the_texts(call, family, name):
    """What `encode_prompt` returns are arguments of `__call__`, by the names in its source."""
    own = family[name]
    reader = type(own)(**{part: own.components[part] if part in TEXTS else None for part in own.components})
    rest = type(own)(**{part: None if part in TEXTS else own.components[part] for part in own.components})
    rest.set_progress_bar_config(disable=True)
    prompt = ["a cat", "two dogs"]
    encoded = reader.encode_prompt(prompt=prompt, device=torch.device("cpu"))
    accepted = inspect.signature(type(own).__call__).parameters
    names = ("prompt_embeds", "negative_prompt_embeds", "prior_prompt_embeds")
    given = {key: value for key, value in zip(names, encoded, strict=True) if key in accepted}
    returned = re.search(r"return (.*prior_prompt_embeds)", inspect.getsource(type(own).encode_prompt))[1]
    assert tuple(returned.split(", ")) == names
    drawn = call(name, pipe=rest, **given | {"prompt": None}, of=None)
    expected = call(name, of=None)
    key = next(iter(expected))
    assert np.abs(np.asarray(drawn[key]) - np.asarray(expected[key])).max() < 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a cat", "prior_prompt_embeds is a str; give what encode_prompt gives last, three tensors"),
        (
            (torch.zeros(2, 8), torch.zeros(2, 12, 16), torch.ones(2, 12)),
            r"prior_prompt_embeds.embeds has shape \(2, 8\)",
        ),
        ((torch.zeros(3, 16), torch.zeros(3, 12, 16), torch.ones(3, 12)), r"embeds has shape \(3, 16\); .* \(2, 16\)"),
        ((torch.zeros(4, 16), torch.zeros(4, 12, 16), torch.ones(4, 12)), "are of 2 images, prompt_embeds of 1"),
    ],
)
def test_what_the_prior_reads_is_checked(family, given, message):
    with pytest.raises(UserError, match=message):
        family["LatentDiffusionPipeline"](prompt_embeds=torch.zeros(1, 12, 16), prior_prompt_embeds=given, **PRIOR)
    with pytest.raises(UserError, match="either prompt or prior_prompt_embeds, and not both"):
        family["LatentDiffusionPipeline"]("a cat", prior_prompt_embeds=given, **PRIOR)


@pytest.mark.parametrize("name", ["LatentDiffusionPipeline", VARIATION])
def test_to_a_precision_and_opened_in_one(family, name, tmp_path):
    own = type(family[name])(**copy.deepcopy(family[name].components)).to(dtype=torch.float16)
    assert {part.dtype for part in own.components.values() if hasattr(part, "dtype")} == {torch.float16}
    own.save_pretrained(tmp_path, variant="fp16")
    assert all(".fp16" in path.name for path in tmp_path.rglob("*.safetensors"))
    wanted = {"vae": torch.bfloat16, "default": torch.float16}
    again = type(own).from_pretrained(tmp_path, variant="fp16", dtype=wanted)
    for part, component in again.components.items():
        if hasattr(component, "dtype"):
            assert component.dtype == wanted.get(part, torch.float16)
            pairs = zip(component.state_dict().values(), getattr(own, part).state_dict().values(), strict=True)
            assert all(torch.equal(one, other.to(one.dtype)) for one, other in pairs)
    own.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`, but"):
        type(own).from_pretrained(tmp_path / "plain", variant="fp16")


def test_no_pickle_is_written_even_if_asked_for(pipe, tmp_path):
    with pytest.warns(UserWarning, match="pickles are not written"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    assert {path.stat().st_mode for path in tmp_path.rglob("*.safetensors")} == {
        (tmp_path / "model_index.json").stat().st_mode
    }
    with pytest.raises(UserError, match="unknown argument 'shard_size' of save_pretrained"):
        pipe.save_pretrained(tmp_path, shard_size=1)


@pytest.mark.parametrize("name", DRAWING)
def test_offloading_keeps_the_picture_and_the_order(call, family, name):
    """Hooks as on an accelerator, with the CPU in its place."""
    expected = call(name).images
    own = type(family[name])(**copy.deepcopy(family[name].components))
    own.set_progress_bar_config(disable=True)
    own.enable_model_cpu_offload(device="cpu")
    ran = []
    for part, component in own.components.items():
        if isinstance(component, torch.nn.Module) and part not in own._exclude_from_cpu_offload:
            assert isinstance(component._hf_hook, CpuOffload)
            component.register_forward_pre_hook(lambda *_, part=part: ran.append(part))
    assert np.array_equal(call(name, pipe=own).images, expected)
    order = own.model_cpu_offload_seq.split("->")
    first = list(dict.fromkeys(ran))
    assert "unet" in first and first == [part for part in order if part in first]


@pytest.mark.parametrize("name", ["LatentDiffusionImg2ImgPipeline", "LatentDiffusionInpaintPipeline"])
def test_an_autoencoder_without_a_distribution(call, family, name):
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    own = type(family[name])(**family[name].components | {"vae": tiny.eval()})
    own.set_progress_bar_config(disable=True)
    assert call(name, pipe=own).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("name", ["LatentDiffusionImg2ImgPipeline", "LatentDiffusionInpaintPipeline"])
def test_tokens_stand_in_for_the_text(call, family, pipe_without_prior, name):
    own = type(family[name]).from_pipe(pipe_without_prior)
    own.set_progress_bar_config(disable=True)
    unguided = call(name, pipe=own)
    assert unguided.images.shape == (1, 16, 16, 3)
    prompt_embeds, negative_prompt_embeds = own.encode_prompt("a cat", torch.device("cpu"))
    given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds, "prompt": None}
    assert np.abs(call(name, pipe=own, **given).images - unguided.images).max() < 1e-6
