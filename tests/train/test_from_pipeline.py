"""Training that goes on from an assembled model, without the runs that it was made of."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.config import LdmConfig
from ldm.training.task import warn_of_another_process
from pipelines import LatentDiffusionPipeline
from pipelines.assemble import assemble
from pipelines.cli import main as ldm_command


def assembled(runs: Path, output: Path, dtype: str) -> Path:
    stages = {"autoencoder": "autoencoder", "clip": "clip", "prior": "prior", "unet": "ldm"}
    return assemble(**{stage: runs / name for stage, name in stages.items()}, output=output, dtype=dtype)


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory) -> Path:
    """As `ldm assemble` leaves it, in half precision."""
    return assembled(runs, tmp_path_factory.mktemp("assembled") / "model", "float16")


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))]


def test_every_stage_goes_on_from_a_model_and_makes_another(model, runs, arguments_of, run_script, tmp_path):
    reads = {
        "clip": ["init"],
        "autoencoder": ["init", "perceptual_clip"],
        "cache": ["clip", "autoencoder"],
        "prior": ["init", "clip"],
        "ldm": ["init", "clip", "autoencoder", "prior"],
    }
    for stage, options in reads.items():
        further = [f"{option}={model}" for option in options]
        further += ["training.max_steps=1"] if stage != "cache" else []
        further += [f"cache={tmp_path / 'cache'}"] if stage in ("prior", "ldm") else []
        assert run_script(stage, arguments_of(stage, runs, tmp_path / stage, *further)) == 0, stage
    text_encoder = load_file(tmp_path / "clip" / "model" / "text_encoder" / "model.safetensors")
    for key, value in load_file(model / "prior_text_encoder" / "model.safetensors").items():
        assert (text_encoder[key] - value.float()).abs().max() < 0.01, key  # one small step away

    stages = {"clip": model, "autoencoder": model, "prior": tmp_path / "prior", "unet": tmp_path / "ldm"}
    arguments = [str(text) for stage, folder in stages.items() for text in (f"--{stage}", folder)]
    with pytest.raises(SystemExit) as ended:
        ldm_command(["assemble", *arguments, "--output", str(tmp_path / "again")])
    assert ended.value.code == 0
    for part in ("vae", "text_encoder", "prior_text_encoder", "image_encoder"):
        assert weights(tmp_path / "again" / part) == weights(model / part), part
    assert weights(tmp_path / "again" / "unet") != weights(model / "unet")
    kept = {path.name for path in (tmp_path / "again" / "training").iterdir()}
    assert {"clip.yaml", "autoencoder.yaml", "prior.yaml", "unet.yaml"} <= kept

    # Of a pipeline that gives the U-Net, the settings are taken, too
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    pipeline.default_settings = {"guidance_scale": 7.0}
    pipeline.save_pretrained(tmp_path / "set")
    assemble(model, model, model, tmp_path / "set", tmp_path / "third")
    assert LatentDiffusionPipeline.from_pretrained(tmp_path / "third").default_settings["guidance_scale"] == 7.0


@pytest.mark.parametrize("stage", ["prior", "ldm"])
def test_a_cache_of_the_run_is_that_of_a_model_with_its_weights(runs, arguments_of, run_script, tmp_path, stage):
    """Whichever of both is given, the same bits are trained."""
    model = assembled(runs, tmp_path / "model", "float32")
    shutil.rmtree(model / "image_encoder")  # which reads images alone, and they have been read
    options = ["clip"] if stage == "prior" else ["clip", "autoencoder", "prior"]
    further = [f"init={model}", *(f"{option}={model}" for option in options), "training.max_steps=1"]
    assert run_script(stage, arguments_of(stage, runs, tmp_path / "run", *further)) == 0
    further = [f"init={runs / stage}", "training.max_steps=1"]
    assert run_script(stage, arguments_of(stage, runs, tmp_path / "other", *further)) == 0
    assert weights(tmp_path / "run" / "model") == weights(tmp_path / "other" / "model")


@pytest.mark.parametrize(
    ("stage", "component", "names"),
    [("prior", "prior", ["clip_mean", "clip_std"]), ("ldm", "image_normalizer", ["mean", "std"])],
)
def test_embeddings_are_standardised_as_the_weights_know_them(
    runs, arguments_of, run_script, tmp_path, stage, component, names
):
    """And not anew, by the embeddings of what it goes on with."""
    begun = shutil.copytree(runs / stage, tmp_path / "begun")
    path = Path("model", component, "diffusion_pytorch_model.safetensors")
    before = load_file(begun / path)
    before |= {name: 2 * before[name] + 1 for name in names}
    save_file(before, begun / path)
    assert run_script(stage, arguments_of(stage, runs, tmp_path / "run", f"init={begun}", "training.max_steps=1")) == 0
    after = load_file(tmp_path / "run" / path)
    assert all(torch.equal(after[name], before[name]) for name in names)


def test_a_unet_that_predicted_something_else_is_told_of(model, capsys):
    config = LdmConfig(output_dir="run", init="model", prediction_type="v_prediction")
    warn_of_another_process(config, model / "unet")
    assert capsys.readouterr().err == ""
    warn_of_another_process(replace(config, prediction_type="sample"), model / "unet")
    assert "was trained with prediction_type=v_prediction, and goes on with sample" in capsys.readouterr().err


def test_what_a_model_cannot_give(model, runs, arguments_of, fails, tmp_path):
    line = fails("ldm", arguments_of("ldm", runs, tmp_path / "run", f"clip={model}"))
    assert f"was written with another text_encoder than {model / 'prior_text_encoder'}" in line  # half precision
    bare = shutil.copytree(model, tmp_path / "bare")
    shutil.rmtree(bare / "image_encoder")
    for stage, option in (("cache", "clip"), ("clip", "init")):
        line = fails(stage, arguments_of(stage, runs, tmp_path / "run", f"{option}={bare}"))
        assert f"{option} {bare}: no image_encoder beside prior_text_encoder" in line
    shutil.rmtree(bare / "prior_text_encoder")
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", f"clip={bare}"))
    assert f"clip {bare}: {bare / 'text_encoder'} has no projection and embeds no texts" in line
    assert not (tmp_path / "run").exists()
