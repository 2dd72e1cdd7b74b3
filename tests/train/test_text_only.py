"""Latent diffusion without a prior: trained on captions alone, laid out as Stable Diffusion, opened by all."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load, load_file

from ldm.clip import export
from ldm.training import run
from pipelines import LatentDiffusionPipeline
from pipelines.card import model_card
from pipelines.cli import main as ldm_command

COMMIT = "a" * 40
FROM_THE_HUB = """
from ldm.training import run
from pipelines import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained("user/model")
parts = run.clip_parts("user/model", "clip", images=True)
assert run.component_folder("user/model", "init", "unet").parents[1] == parts.image_encoder.parents[2]
pipe.push_to_hub("user/copy")
"""
DRAW = {"prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}


def ldm(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        ldm_command([str(argument) for argument in arguments])
    return ended.value.code


def stages(runs: Path, *names: str) -> list[object]:
    """Options of `ldm assemble`."""
    return [part for name in names for part in (f"--{name}", runs / name)]


@pytest.fixture(scope="module")
def text_runs(runs, arguments_of, run_script, tmp_path_factory) -> Path:
    """Runs of the stages without a prior, of a CLIP whose embeddings, unlike its text tower, are 24 wide."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "autoencoder").symlink_to(runs / "autoencoder")
    assert run_script("clip", arguments_of("clip", runs, folder / "clip", "model.embedding_dim=24")) == 0
    assert run_script("cache", arguments_of("cache", folder, folder / "cache")) == 0
    validated = f"validation_cache={folder / 'cache'}"
    assert run_script("ldm", arguments_of("ldm_text", folder, folder / "unet", validated)) == 0
    return folder


@pytest.fixture(scope="module")
def model(text_runs, tmp_path_factory) -> Path:
    """What `ldm assemble` makes of them."""
    folder = tmp_path_factory.mktemp("assembled") / "model"
    assert ldm("assemble", *stages(text_runs, "autoencoder", "clip", "unet"), "--output", folder) == 0
    return folder


def drawn(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**DRAW, generator=torch.Generator().manual_seed(0)).images


def test_a_run_leaves_no_part_of_image_embeddings(text_runs):
    folder = text_runs / "unet"
    assert sorted(path.name for path in (folder / "model").iterdir()) == ["scheduler", "unet"]
    assert UNet2DConditionModel.from_pretrained(folder / "model" / "unet").class_embedding is None
    low, high = Image.open(folder / "samples" / "step-000004.png").convert("L").getextrema()
    assert low < high
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss" in line]) == 4
    assert any(len(line.get("validation_loss_over_t", [])) == 10 for line in lines)


def test_stock_diffusers_opens_the_folder_and_draws_the_same(model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*steps_offset")
        stock = DiffusionPipeline.from_pretrained(model)
    assert type(stock) is StableDiffusionPipeline and stock.safety_checker is None
    theirs, ours = drawn(stock), drawn(pipe := LatentDiffusionPipeline.from_pretrained(model))
    assert theirs.std() > 0.01 and np.abs(theirs - ours).max() <= 1 / 255
    assert pipe.default_settings["guidance_scale"] == 1.5  # of the run's grids


def test_the_whole_clip_lies_beside(model):
    """And is what `clip=` finds in the folder."""
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    clip = export.load(run.clip_parts(str(model), "clip", images=True))
    ids = pipe.tokenizer("a red circle", return_tensors="pt").input_ids
    told = clip.text_encoder(ids)
    assert torch.equal(told.last_hidden_state, pipe.text_encoder(ids).last_hidden_state)
    assert told.text_embeds.shape == clip.image_embeds(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


def test_it_is_evaluated_and_described_without_a_prior(model, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"red {number}")
    few = ["--data", tmp_path / "pictures", "--num-images", 6, "--num-inference-steps", 1]
    assert ldm("evaluate", "--model", model, "--output", tmp_path / "report", *few) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"CLIP score", "Fréchet distance"} <= {figure["name"] for figure in report["figures"]}
    assert not any(figure["part"] == "Prior" for figure in report["figures"])
    assert not any("prior" in name or name == "noise_level" for name in report["settings"])
    card = model_card(model, "user/model")
    assert "a U-Net guided by it removes noise" in card and "a prior turns" not in card


def test_a_repository_is_opened_trained_on_from_and_pushed_whole(model, hub):
    hub.repositories["user/model"] = {COMMIT: model}
    result = hub.run(FROM_THE_HUB)
    assert result.returncode == 0, result.stderr
    pushed = hub.pushed["user/copy"]
    weights = {path.relative_to(model).as_posix() for path in model.rglob("*.safetensors")}
    assert {name for name in pushed if name.endswith(".safetensors")} == weights
    assert any(name.startswith("clip/") for name in weights)
    for name in weights:
        there, here = load(pushed[name]), load_file(model / name)
        assert there.keys() == here.keys() and all(torch.equal(there[key], here[key]) for key in here), name


def test_training_goes_on_from_the_folder_and_from_its_own_kind_alone(
    runs, text_runs, model, arguments_of, run_script, fails, tmp_path
):
    once = ["training.max_steps=1", "sample_prompts=[]"]
    further = [f"init={model}", *once]
    assert run_script("ldm", arguments_of("ldm_text", text_runs, tmp_path / "run", *further)) == 0
    line = fails("ldm", arguments_of("ldm_text", runs, tmp_path / "none", f"init={runs / 'ldm'}"))
    assert "its U-Net was trained with image_conditioning=True; set it alike" in line
    line = fails("ldm", arguments_of("ldm", runs, tmp_path / "none", f"init={model}"))
    assert "its U-Net was trained with image_conditioning=False; set it alike" in line
    line = fails("ldm", arguments_of("ldm_text", runs, tmp_path / "none", "model.class_embed_type=projection"))
    assert "model.class_embed_type projection: it follows from the data and the other stages, and is None" in line
    assert not (tmp_path / "none").exists()


def test_sizes_are_told_at_the_full_width(text_runs, arguments_of, run_script, tmp_path):
    told = ["size_conditioning=true", "model.addition_embed_type=null", "training.max_steps=1"]
    assert run_script("ldm", arguments_of("ldm_text", text_runs, tmp_path / "run", *told)) == 0  # draws a grid
    config = UNet2DConditionModel.load_config(tmp_path / "run" / "model" / "unet")
    assert (config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]) == (6 * 256, 256)


def test_a_prior_belongs_to_a_unet_that_image_embeddings_guide(runs, text_runs, tmp_path, capsys):
    output = ["--output", tmp_path / "model"]
    capsys.readouterr()
    assert ldm("assemble", *stages(text_runs, "autoencoder", "clip", "unet"), "--prior", runs / "prior", *output) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "captions alone guide this U-Net" in line and "leave it out" in line
    assert ldm("assemble", *stages(runs, "autoencoder", "clip"), "--unet", runs / "ldm", *output) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "--prior is missing: image embeddings guide this U-Net" in line
    assert not (tmp_path / "model").exists()
