"""Each training script for a few steps on drawn scenes: what it leaves, and what it logs."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from ldm import configuration
from ldm.autoencoders import discriminator
from ldm.config import LdmConfig
from pipelines import LatentDiffusionPipeline
from pipelines.cli import main as ldm_command

METRICS = {
    "clip": {"clip_loss", "image_image_loss", "learning_rate", "temperature", "image_to_text", "text_to_image"},
    "autoencoder": {"l1", "kl", "psnr", "perceptual", "learning_rate"},
    "prior": {"loss", "learning_rate"},
    "ldm": {"loss", "learning_rate"},
}
TRAINED = sorted(METRICS)


@pytest.mark.parametrize("stage", TRAINED)
def test_every_step_is_logged(runs, stage):
    lines = [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if METRICS[stage] <= set(line)}
    assert sorted(steps) == [1, 2, 3, 4]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert list((runs / stage / "tensorboard").glob("events.*"))


def test_a_discriminator_whose_loss_is_no_number_is_never_saved(
    runs, arguments_of, run_script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(discriminator, "discriminator_loss", lambda real, fake: (real - fake).mean() * math.nan)
    arguments = arguments_of("autoencoder", runs, tmp_path / "run", "training.checkpoint_every=1")
    assert run_script("autoencoder", arguments) == 1
    assert "step 2: the discriminator's loss is nan" in capsys.readouterr().err
    (kept,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert kept.name == "step-000001"
    assert all(value.isfinite().all() for value in load_file(kept / "discriminator.safetensors").values())


@pytest.mark.parametrize("stage", TRAINED)
def test_checkpoints_hold_no_pickle(runs, stage):
    checkpoints = sorted(path.name for path in (runs / stage / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000004"]
    files = [path for path in (runs / stage).rglob("*") if path.is_file() and path.parent.name != "tensorboard"]
    kinds = {path.suffix for path in files if path.name != ".lock"}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".txt", ".jinja"}


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "ldm"])
def test_grids_are_pictures(runs, stage):
    (grid,) = (runs / stage / "samples").iterdir()
    assert grid.name == "step-000004.png"
    low, high = Image.open(grid).convert("L").getextrema()
    assert low < high


@pytest.mark.parametrize("stage", TRAINED)
def test_exports_the_averaged_weights(runs, stage):
    ema = load_file(runs / stage / "checkpoints" / "step-000004" / "ema.safetensors")
    raw = load_file(runs / stage / "checkpoints" / "step-000004" / "model.safetensors")
    model = runs / stage / "model"
    pairs = {
        "clip": (model / "text_encoder", "text_model.embeddings.token_embedding.weight", "clip.token_embedding.weight"),
        "autoencoder": (model / "vae", "encoder.conv_in.weight", "encoder.conv_in.weight"),
        "prior": (model / "prior", "proj_in.weight", "proj_in.weight"),
        "ldm": (model / "unet", "conv_in.weight", "conv_in.weight"),
    }
    folder, theirs, ours = pairs[stage]
    (exported,) = [state[theirs] for path in folder.glob("*.safetensors") if theirs in (state := load_file(path))]
    assert torch.equal(exported, ema[ours])
    assert not torch.equal(exported, raw[ours])


def test_stock_classes_open_every_component(runs):
    vae = AutoencoderKL.from_pretrained(runs / "autoencoder" / "model" / "vae")
    text = CLIPTextModelWithProjection.from_pretrained(runs / "clip" / "model" / "text_encoder")
    image = CLIPVisionModelWithProjection.from_pretrained(runs / "clip" / "model" / "image_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(runs / "clip" / "model" / "tokenizer")
    prior = PriorTransformer.from_pretrained(runs / "prior" / "model" / "prior")
    unet = UNet2DConditionModel.from_pretrained(runs / "ldm" / "model" / "unet")
    assert vae.config.latent_channels == unet.config.in_channels == 4
    assert text.config.projection_dim == image.config.projection_dim == prior.config.embedding_dim == 16
    assert unet.config.projection_class_embeddings_input_dim == 32
    assert tokenizer.model_max_length == prior.config.num_embeddings == 16


def test_latents_are_standardised(runs):
    """The exported autoencoder's latents, times scaling_factor, have zero channel means and unit variance."""
    cache = load_file(next((runs / "cache").glob("images-*.safetensors")))
    mean, std = cache["latent_mean"].float(), cache["latent_std"].float()
    variance = mean.var(unbiased=False) + (std**2).mean()
    assert mean.mean(dim=(0, 1, 3, 4)).abs().max() < 0.2
    assert variance.item() == pytest.approx(1.0, rel=0.2)


def test_the_prior_is_compared_with_baselines(runs):
    last = json.loads((runs / "prior" / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(-1 <= last[f"cosine_{name}"] <= 1 for name in ("prior", "text", "mean"))


def test_the_resolved_configuration_is_kept(runs):
    config = configuration.load(LdmConfig, runs / "ldm" / "config.yaml")
    assert config.training.max_steps == 4 and config.model["block_out_channels"] == [16, 32]


def test_the_runs_assemble_into_a_pipeline_that_draws(runs, tmp_path):
    options = {"autoencoder": "autoencoder", "clip": "clip", "prior": "prior", "unet": "ldm"}
    arguments = [text for option, stage in options.items() for text in (f"--{option}", str(runs / stage))]
    with pytest.raises(SystemExit) as ended:
        ldm_command(["assemble", *arguments, "--output", str(tmp_path / "model")])
    assert ended.value.code == 0
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    # It draws with the guidance of the run's own grids
    settings = pipeline.default_settings
    assert (settings["guidance_scale"], settings["prior_guidance_scale"]) == (1.5, 1.0)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a small red circle on the left", num_inference_steps=2, prior_num_inference_steps=2).images
    assert image.size == (32, 32)

    # CLIP's image tower lies beside the pipeline, for image variations and further training
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeds = [
        CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32)(x).image_embeds
        for folder in (tmp_path / "model", runs / "clip" / "model")
    ]
    torch.testing.assert_close(*embeds, atol=2e-2, rtol=0)  # half precision
    assert (tmp_path / "model" / "image_processor" / "preprocessor_config.json").is_file()


def test_clip_that_learns_nothing_says_so(runs, arguments_of, run_script, tmp_path, capfd):
    slow = ["training.learning_rate=1e-9", "training.max_steps=100", "image_image_weight=0", "training.warmup_steps=0"]
    assert run_script("clip", arguments_of("clip", runs, tmp_path / "run", *slow)) == 0
    said = capfd.readouterr().out
    assert "warning: step 100: the loss" in said and "sits at ln(8) = 2.079" in said


def test_clip_trains_beside_images_without_a_caption(runs, arguments_of, run_script, tmp_path, capfd):
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        Image.new("RGB", (32, 32), (25 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(("", "a red square")[number % 2])
    further = [f"data.source={tmp_path / 'pictures'}", "data.max_images=100", "training.batch_size=10"]
    assert run_script("clip", arguments_of("clip", runs, tmp_path / "run", *further)) == 0
    assert "warning: 5 of 10 captions looked at are empty: with one an image is in no pair" in capfd.readouterr().err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["clip_loss"] == pytest.approx(math.log(5), rel=0.2)  # chance among five pairs, not ten


def test_clip_says_which_captions_it_does_not_read_to_the_end(runs, arguments_of, run_script, tmp_path, capfd):
    assert run_script("clip", arguments_of("clip", runs, tmp_path / "run", "context_length=10")) == 0
    assert "24 captions looked at are longer than context_length 10, up to" in capfd.readouterr().err


def test_autoencoder_that_collapses_says_so(runs, arguments_of, run_script, tmp_path, capfd):
    """A KL weight beyond reason leaves the prior in every channel, and nothing of the image."""
    heavy = ["kl_weight=1e4", "perceptual_weight=0", "adversarial_weight=0", "training.learning_rate=0.05"]
    arguments = arguments_of("autoencoder", runs, tmp_path / "run", *heavy, "training.max_steps=60")
    assert run_script("autoencoder", arguments) == 0
    assert "warning: collapse: 4 of 4 latent channels carry nothing; lower kl_weight" in capfd.readouterr().out
