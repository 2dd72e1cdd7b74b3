"""Training the last step of drawing: where it begins, what it leaves, how it resumes, and who may train it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.training.randomness import generator
from pipelines import LatentDiffusionPipeline
from pipelines.assemble import assemble

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.max_images=24",
    "num_inference_steps=3",
    "num_states=10",
    "num_prior_samples=1",
    "adversarial_start=1",
    "discriminator_channels=8",
    "discriminator_updates=2",
    "sample_prompts=[a small red circle on the left]",
    "training.precision=fp32",
    "training.max_steps=4",
    "training.batch_size=8",
    "training.log_every=1",
    "training.sample_every=4",
    "training.checkpoint_every=2",
]
PROMPT = "a small red circle on the left"
LAST = "checkpoints/step-000004"


def arguments(base: Path, output: Path, *further: str) -> list[str]:
    config = ROOT / "configs" / "shapes" / "last_step.yaml"
    return ["--config", str(config), f"init={base}", f"output_dir={output}", *SMALL, *further]


@pytest.fixture(scope="module")
def run(base, run_script, tmp_path_factory) -> Path:
    """Four steps, that leave the base as it is."""
    folder = tmp_path_factory.mktemp("last") / "run"
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert run_script("last_step", arguments(base, folder)) == 0
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    return folder


def test_the_losses_and_what_is_trained(base, run, logged):
    lines = logged(run)
    assert [sorted(line.keys() & {"squared_error", "adversarial", "discriminator", "matching"}) for line in lines] == [
        ["discriminator", "matching"],
        *[["adversarial", "discriminator", "matching", "squared_error"]] * 3,
    ]
    assert all(0 < line["squared_error"] < 10 for line in lines[1:])
    assert (run / "samples" / "step-000004.png").is_file()
    begun = LatentDiffusionPipeline.from_pretrained(base).unet.state_dict()
    trained = load_file(run / LAST / "model.safetensors")
    assert begun.keys() == trained.keys()
    assert sum(not torch.equal(begun[name], trained[name]) for name in begun) > 0.9 * len(begun)
    averaged, exported = (
        load_file(run / LAST / "ema.safetensors"),
        load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    assert all(torch.equal(averaged[name], exported[name]) for name in averaged)


def test_states_are_those_of_drawing_before_its_last_step(base, run):
    """Each a function of the seed and its number, whatever was drawn beside it."""
    with safe_open(run / "states.safetensors", "pt") as stored:
        captions = json.loads(stored.metadata()["captions"])
    states, number = load_file(run / "states.safetensors"), 7
    assert len(captions) == len(states["z_t"]) == len(states["class_labels"]) == 10 and len(set(captions)) > 1
    pipe = LatentDiffusionPipeline.from_pretrained(base)
    drawn = assembled(base, run)
    drawn.set_progress_bar_config(disable=True)
    seen = {}

    def keep(_pipe, step, _t, tensors):
        seen[step] = tensors["latents"]
        return {}

    drawn.unet = pipe.unet  # the one that the states were drawn with
    drawn(captions[number], generator=generator(0, "state", number), output_type="latent", callback_on_step_end=keep)
    assert sorted(seen) == [0, 1, 2]
    torch.testing.assert_close(states["z_t"][number], seen[1][0], rtol=0, atol=1e-4)
    sigma = drawn.scheduler.sigmas[-2].item()
    assert sigma == pytest.approx(0.5, rel=1e-3)


def assembled(base: Path, run: Path) -> LatentDiffusionPipeline:
    model = run.parent / "model"
    if not model.exists():
        assemble(base, base, base, run, model, dtype="float32")
    return LatentDiffusionPipeline.from_pretrained(model)


def test_the_assembled_folder_draws_as_it_was_trained_to_in_stock_diffusers_too(base, run):
    ours = assembled(base, run)
    assert {name: ours.default_settings[name] for name in ("num_inference_steps", "guidance_scale")} == {
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
    }
    assert ours.default_settings["num_prior_samples"] == 1 and ours.default_settings["prior_guidance_scale"] == 1.0
    stock = DiffusionPipeline.from_pretrained(run.parent / "model")
    settings = {"num_inference_steps": 3, "guidance_scale": 1.5, "prior_guidance_scale": 1.0}
    pictures = []
    for pipe, told in ((ours, {}), (stock, settings)):
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **told).images)
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-4)


def test_what_the_first_model_says_of_its_prior_is_kept(base, run_script, tmp_path):
    """And what it says of guidance, which the last step was not trained with, is not."""
    begun = tmp_path / "base"
    shutil.copytree(base, begun)
    index = json.loads((begun / "model_index.json").read_text())
    of_prior = {"noise_level": 100, "prior_num_inference_steps": 7}
    index["_default_settings"] = {**of_prior, "num_prior_samples": 3, "guidance_rescale": 0.7}
    (begun / "model_index.json").write_text(json.dumps(index))
    few = ["training.max_steps=2", "num_states=2", "sample_prompts=[]"]
    assert run_script("last_step", arguments(begun, tmp_path / "run", *few)) == 0
    assemble(begun, begun, begun, tmp_path / "run", tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["_default_settings"] == {
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "prior_guidance_scale": 1.0,
        "num_prior_samples": 1,
        **of_prior,
    }


def test_resumed_run_equals_the_uninterrupted_one(base, run, run_script, fails, logged, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / LAST)
    shutil.rmtree(folder / "model")
    assert run_script("last_step", arguments(base, folder, "--resume")) == 0
    for name in ("model", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        once, again = (load_file(place / LAST / f"{name}.safetensors") for place in (run, folder))
        assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once), name
    shutil.rmtree(folder / LAST)
    (folder / "states.safetensors").unlink()
    assert "is missing or damaged, and the run cannot go on" in fails("last_step", arguments(base, folder, "--resume"))


def test_two_processes_train_what_one_does(base, run_script, pair, logged, tmp_path):
    """In small steps: Adam's first ones, which are of one size whatever the gradient, magnify rounding."""
    slow = ["training.learning_rate=1e-6", "discriminator_learning_rate=1e-5"]
    assert run_script("last_step", arguments(base, tmp_path / "one", *slow)) == 0
    pair.run("last_step", arguments(base, tmp_path / "two", *slow))
    one, two = (load_file(tmp_path / name / "states.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-4) for name in one)
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    for name in ("discriminator", "matching", "adversarial", "squared_error"):
        first, second = (torch.tensor([line[name] for line in lines if name in line]) for lines in (one, two))
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


def test_a_model_without_a_prior(runs, run_script, arguments_of, tmp_path):
    assert run_script("ldm", arguments_of("ldm_text", runs, tmp_path / "text", "training.max_steps=1")) == 0
    base = assemble(runs / "autoencoder", runs / "clip", None, tmp_path / "text", tmp_path / "base")
    assert run_script("last_step", arguments(base, tmp_path / "run")) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == [
        "scheduler",
        "settings.json",
        "unet",
    ]
    assert list(load_file(tmp_path / "run" / "states.safetensors")) == ["z_t"]
    model = assemble(base, base, None, tmp_path / "run", tmp_path / "model")
    stock = DiffusionPipeline.from_pretrained(model)
    assert type(stock) is StableDiffusionPipeline and stock.scheduler.config.use_exponential_sigmas
    assert LatentDiffusionPipeline.from_pretrained(model).default_settings["num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("init=scratch", "init must be the folder or repository of a pipeline"),
        ("init=nowhere/at/all", "init nowhere/at/all: "),
        ("training.batch_size=7", "training.batch_size 7: every process halves its photographs"),
        ("discriminator_channels=1", "discriminator_channels must be >= 2"),
        ("matching_weight=-1", "matching_weight must be >= 0"),
        ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps must be 1 here"),
        ("training.find_micro_batch=true", "training.find_micro_batch"),
        ("last_sigma=60", "last_sigma must be above 0 and below first_sigma"),
        ("num_inference_steps=1", "num_inference_steps must be >= 2"),
        ("adversarial_start=4", "adversarial_start must be in [0, training.max_steps)"),
        ("data.image_size=64", "data.image_size 64: init"),
        ("data.streaming=true", "data.streaming"),
    ],
)
def test_what_cannot_be(base, fails, tmp_path, option, words):
    assert words in fails("last_step", arguments(base, tmp_path / "run", option))
    assert not (tmp_path / "run").exists()


def test_a_model_that_lacks_the_image_tower(base, fails, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "image_encoder")
    assert "image_encoder" in fails("last_step", arguments(tmp_path / "base", tmp_path / "run"))
