"""train_ldm.py with autoencoder=none, DDPM in pixel space: every objective, resumed, and opened by stock pipelines."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from safetensors.torch import load_file

CONFIG = Path(__file__).parents[2] / "configs" / "digits" / "ldm.yaml"
OBJECTIVES = {
    "simple": [],
    "vlb": ["objective=vlb"],
    "hybrid": ["objective=hybrid", "variance=learned_range"],
    "classes": ["class_conditional=true", "caption_dropout=0.5"],
    "importance": ["objective=vlb", "variance=learned_range", "timestep_sampling=importance", "num_train_timesteps=4"],
}


def arguments(output, *further):
    small = ["model.block_out_channels=[8,16]", "model.norm_num_groups=4", "model.attention_head_dim=4"]
    every = [f"training.{name}_every={steps}" for name, steps in (("log", 1), ("sample", 12), ("checkpoint", 6))]
    return ["--config", str(CONFIG), f"output_dir={output}", "data.max_images=40", "training.max_steps=12",
            "training.batch_size=8", "training.precision=fp32", "num_train_timesteps=60", *small, *every,
            *further]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory, run_script):
    """A run with each objective, twelve steps."""
    folder = tmp_path_factory.mktemp("pixels")
    for name, further in OBJECTIVES.items():
        assert run_script("ldm", arguments(folder / name, *further)) == 0, name
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_logs_losses_and_draws_a_grid(digits, name):
    lines = [json.loads(line) for line in (digits / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert (digits / name / "samples" / "step-000012.png").is_file()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stock_ddpm_opens_and_draws(digits, name):
    pipeline = DDPMPipeline.from_pretrained(digits / name / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.unet, UNet2DModel)
    if name == "classes":  # which the stock pipeline does not pass on; the U-Net takes them
        classes = json.loads((digits / name / "model" / "classes.json").read_text())
        assert classes == ["", *(f"the digit {number}" for number in range(10))]
        assert pipeline.unet.config.num_class_embeds == 11
        x = torch.zeros(2, 1, 8, 8)
        seven, none = (pipeline.unet(x, 5, class_labels=torch.tensor([n, n])).sample for n in (8, 0))
        assert not torch.equal(seven, none)
        return
    assert pipeline.unet.config.out_channels == (2 if name in ("hybrid", "importance") else 1)
    draw = torch.Generator().manual_seed(0)
    images = pipeline(2, generator=draw, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and images.min() >= 0 and images.max() <= 1 and images.std() > 0


def test_stock_ddim_opens_and_draws(digits):
    pipeline = DDIMPipeline.from_pretrained(digits / "simple" / "model")
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    assert pipeline(2, generator=draw, num_inference_steps=4, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resumed_run_equals_the_uninterrupted_one(digits, run_script, tmp_path, name):
    """With importance sampling too: the history of the bound's terms, by then full, is kept."""
    shutil.copytree(digits / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    assert run_script("ldm", arguments(tmp_path / "run", *OBJECTIVES[name], "--resume")) == 0
    for path in sorted((digits / name).rglob("*.safetensors")):
        once, again = load_file(path), load_file(tmp_path / "run" / path.relative_to(digits / name))
        assert all(torch.equal(once[key].nan_to_num(7), again[key].nan_to_num(7)) for key in once), path
    kept = (
        load_file(digits / name / "checkpoints" / "step-000012" / "importance.safetensors")
        if name == "importance"
        else {}
    )
    assert all(value.isfinite().float().mean() > 0.9 for value in kept.values())


@pytest.mark.parametrize(
    ("changed", "allowed", "said"),
    [
        ("average_lengths=[0.1]", "average_lengths", "holds no average-0.100"),
        ("class_conditional=true", "class_conditional", 'another network .*Missing key.*"class_embedding.weight"'),
        ("training.optimizer=muon", "training.optimizer", "training.optimizer was adamw, is muon"),
    ],
)
def test_changes_that_no_checkpoint_bears_are_one_line(digits, fails, tmp_path, changed, allowed, said):
    shutil.copytree(digits / "simple", tmp_path / "run")
    line = fails("ldm", arguments(tmp_path / "run", changed, f"resume.allow=[{allowed}]", "--resume"))
    assert re.search(said, line), line


def test_a_resumed_run_may_search_its_micro_batch_anew(digits, run_script, tmp_path):
    """What is told of when memory runs out: else the checkpoint's number of accumulation steps stays."""
    shutil.copytree(digits / "simple", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    state = tmp_path / "run" / "checkpoints" / "step-000007" / "state.json"
    for option, accumulation in (("gradient_accumulation_steps=2", 2), ("find_micro_batch=true", 1)):
        name = option.split("=")[0]
        shutil.rmtree(state.parent, ignore_errors=True)
        allowed = f"resume.allow=[training.max_steps,training.gradient_accumulation_steps,training.{name}]"
        further = [f"training.{option}", "training.max_steps=7", allowed, "--resume"]
        assert run_script("ldm", arguments(tmp_path / "run", *further)) == 0
        assert json.loads(state.read_text())["accumulation"] == accumulation


def test_the_bound_of_latents(runs, arguments_of, run_script, tmp_path):
    extra = ["objective=vlb", "min_snr_gamma=null", "sample_prompts=[]"]
    assert run_script("ldm", arguments_of("ldm", runs, tmp_path / "run", *extra)) == 0


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["objective=bound"], "objective must be one of simple, vlb, hybrid, got 'bound'"),
        (["objective=hybrid"], "variance must be learned_range with objective=hybrid.*got fixed_small"),
        (["variance=learned_range"], "variance must be .* fixed with objective=simple, got learned_range"),
        (["timestep_sampling=importance"], "timestep_sampling must be uniform or logit_normal unless objective is vlb"),
        (["objective=vlb", "min_snr_gamma=5"], "min_snr_gamma must be null with objective=vlb, got 5.0"),
        (["objective=vlb", "num_train_timesteps=1"], "num_train_timesteps must be > 1 with objective=vlb, got 1"),
        (["sample_prompts=[a seven]", "prior=x"], "sample_prompts must be empty in pixel space"),
        (["class_conditional=true", "data.source=shapes", "data.max_images=2000"], "at most 999 can be classes"),
        (["model.norm_num_groups=5"], "model: num_channels .8. must be divisible by num_groups .5."),
        (["data.image_size=7"], "data.image_size 7: the U-Net halves images to a 2th; take a multiple of 2"),
        (["model.cross_attention_dim=8"], "unknown key 'model.cross_attention_dim'"),
    ],
)
def test_bad_input_is_one_line(fails, tmp_path, further, said):
    line = fails("ldm", arguments(tmp_path / "run", *further))
    assert re.search(said, line), line
    assert not (tmp_path / "run").exists()


def test_classes_and_grey_belong_to_pixel_space(fails, runs, arguments_of, tmp_path):
    for name in ("class_conditional", "greyscale"):
        line = fails("ldm", arguments_of("ldm", runs, tmp_path / "run", f"{name}=true"))
        assert f"{name} must be false unless autoencoder is none" in line


def test_a_learned_variance_is_refused_in_latent_space(fails, runs, arguments_of, tmp_path):
    extra = ["objective=hybrid", "variance=learned_range", "min_snr_gamma=null"]
    assert "stock text-to-image pipelines know no learned variance" in fails(
        "ldm", arguments_of("ldm", runs, tmp_path / "run", *extra)
    )
