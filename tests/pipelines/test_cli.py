"""The command line as a user meets it: exit codes, one line, nothing overwritten."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UnCLIPScheduler
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.errors import RunError
from pipelines import cli

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


def ldm(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """`ldm ...` in a process of its own, in which importing torch or diffusers fails: mistakes are found before."""
    script = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\nfrom pipelines.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
    )


def run(*arguments: object) -> int:
    """The same in this process. Returns the exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of a mistake."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr


def stages(runs: dict[str, Path], **instead: Path) -> list:
    return [part for stage, folder in (runs | instead).items() for part in (f"--{stage}", folder)]


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory) -> Path:
    """A folder put together by `ldm assemble`."""
    folder = tmp_path_factory.mktemp("assembled") / "model"
    assert run("assemble", *stages(runs), "--output", folder) == 0
    return folder


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--output", "a.png"], "prompt '' is empty"),
        (["   ", "--output", "a.png"], "is empty"),
        (["a cat"], "--output"),
        (["--output", "a.png"], "prompt"),
        (["a cat", "--output", "a.png", "--num-inference-steps", "0"], "--num-inference-steps is 0"),
        (["a cat", "--output", "a.png", "--num-inference-steps", "-1"], "--num-inference-steps is -1"),
        (["a cat", "--output", "a.png", "--num-inference-steps", "two"], "-steps is 'two'; it must be a whole number"),
        (["a cat", "--output", "a.png", "--guidance-scale", "nan"], "--guidance-scale is nan"),
        (["a cat", "--output", "a.png", "--guidance-scale", "inf"], "--guidance-scale is inf"),
        (["a cat", "--output", "a.png", "--num-images", "0"], "--num-images is 0"),
        (["a cat", "--output", "a.png", "--num-images", "999999999"], "--num-images is 999999999; it must be a whole"),
        (["a cat", "--output", "a.png", "--seed", "-1"], "--seed is -1"),
        (["a cat", "--output", "a.png", "--strength", "0.5"], "--strength belongs to a picture to start from"),
        (["a cat", "--output", "a.png", "--mask", "mask.png"], "--mask belongs to a picture to start from"),
        (["a cat", "--output", "a.png", "--image", "none.png"], "--image 'none.png' is not a file"),
        (["a cat", "--output", "a.png", "--image", "none.png", "--strength", "2"], "--strength is 2.0"),
        (["a cat", "--output", "a.gif"], "'a.gif' is no picture's name"),
        (["a cat", "--output", "a"], "'a' is no picture's name"),
        (["a cat", "--output", "nowhere/a.png"], "the folder 'nowhere' does not exist"),
        (["a cat", "--output", "folder.png"], "'folder.png' is a folder"),
        (["a cat", "--output", "~nobody-of-this-name/a.png"], "the folder '~nobody-of-this-name' does not exist"),
        (["a cat", "--output", "a.png", "--model", "~nobody-of-this-name"], "'~nobody-of-this-name' does not exist"),
        (["a cat", "--output", "a.png", "--model", "nowhere"], "model folder 'nowhere' does not exist"),
        (["a cat", "--output", "a.png", "--model", "."], "model_index.json' is missing"),
        (["a cat", "--output", "a.png", "--model", ".", "--revision", "x"], "revision 'x' belongs to a repository"),
        (["a cat", "--output", "a.png", "--model", "nobody/nothing"], "the Hub cannot be reached"),
        (["a cat", "--otput", "a.png"], "unknown option '--otput'; did you mean '--output'?"),
        (["a cat", "--out", "a.png"], "unknown option '--out'; did you mean '--output'?"),
    ],
)
def test_generate_refuses_in_one_line_before_anything_heavy(tmp_path, arguments, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a.png").write_text("precious")
    assert message in refused(ldm("generate", *arguments, cwd=tmp_path))
    assert (tmp_path / "a.png").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png"]


@pytest.mark.parametrize(("arguments", "message"), [([], "COMMAND"), (["draw"], "'draw'"), (["--hlep"], "'--help'")])
def test_no_or_an_unknown_command(tmp_path, arguments, message):
    assert message in refused(ldm(*arguments, cwd=tmp_path))


@pytest.mark.parametrize("arguments", [[], ["generate"], ["assemble"], ["evaluate"]])
def test_help_needs_nothing_heavy(tmp_path, arguments):
    result = ldm(*arguments, "--help", cwd=tmp_path)
    assert result.returncode == 0 and "usage: ldm" in result.stdout and result.stderr == ""


def test_generate_writes_a_picture_in_a_process_of_its_own(model, tmp_path):
    arguments = ["a cat", "--model", str(model), "--output", str(tmp_path / "cat.png"), "--num-inference-steps", "3"]
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "generate", *arguments],
        cwd=Path(cli.__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{tmp_path / 'cat.png'}\n", "")
    assert Image.open(tmp_path / "cat.png").size == (16, 16)


def test_several_pictures_are_those_of_the_following_seeds(model, tmp_path, capsys):
    common = ["--model", model, "--num-inference-steps", 3]
    assert run("generate", "a cat", *common, "--output", tmp_path / "cat.png", "--num-images", 3, "--seed", 7) == 0
    names = ["cat-0.png", "cat-1.png", "cat-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    assert run("generate", "a cat", *common, "--output", tmp_path / "one.png", "--seed", 9) == 0
    pictures = [np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("cat-0.png", "cat-2.png", "one.png")]
    assert np.abs(pictures[1] - pictures[2]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 1


def test_a_picture_is_replaced_only_by_a_whole_one(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "vae/config.json").read_text())
    (broken / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 1e-45}))
    (tmp_path / "cat.png").write_text("precious")
    assert run("generate", "a cat", "--model", broken, "--output", tmp_path / "cat.png") == 1
    assert (tmp_path / "cat.png").read_text() == "precious"
    printed = capsys.readouterr()
    assert printed.out == "" and "failed: the image is not finite" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "cat.png"]


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path):
    (tmp_path / "cat.png").write_text("precious")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(RunError, match=r"cat.png' could not be written"):
            cli._write(Image.effect_noise((64, 64), 50), tmp_path / "cat.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]
    assert (tmp_path / "cat.png").read_text() == "precious"


def test_a_model_says_what_it_knows_when_asked_for_something_else(model, tmp_path, capsys):
    knowing = tmp_path / "knowing"
    shutil.copytree(model, knowing)
    (knowing / "knows.json").write_text(json.dumps({"words": ["cat", "dog"], "says": "it knows cat and dog"}))
    common = ["--model", knowing, "--output", tmp_path / "a.png", "--num-inference-steps", 2]
    for prompt, said in (("a photo of a Cat", False), ("two dogs", False), ("a catalogue", True), ("a boat", True)):
        assert run("generate", prompt, *common) == 0
        assert (capsys.readouterr().err == "note: it knows cat and dog\n") is said
    (knowing / "knows.json").write_text(json.dumps({"words": 2, "says": "it knows cat and dog"}))
    assert run("generate", "a cat", *common) == 2
    assert "knows.json': words must be a list, and says a text" in capsys.readouterr().err


def test_generate_starts_from_a_picture(model, photos, mask, tmp_path):
    photos[0].resize((40, 32)).save(tmp_path / "photo.png")
    mask.resize((40, 32)).save(tmp_path / "mask.png")
    common = ["--model", model, "--image", tmp_path / "photo.png", "--num-inference-steps", 4]
    assert run("generate", "a cat", *common, "--strength", 0.3, "--output", tmp_path / "weak.png") == 0
    assert run("generate", "a cat", *common, "--output", tmp_path / "strong.png") == 0
    assert run("generate", "a cat", *common, "--mask", tmp_path / "mask.png", "--output", tmp_path / "in.png") == 0
    own = np.asarray(ImageOps.fit(Image.open(tmp_path / "photo.png"), (16, 16))).astype(int)
    weak, strong, inpainted = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("weak", "strong", "in"))
    assert weak.shape == strong.shape == (16, 16, 3) and not np.array_equal(weak, strong)
    assert np.array_equal(inpainted[:, :6], own[:, :6]) and not np.array_equal(inpainted[:, 10:], own[:, 10:])


def test_generate_refuses_a_picture_that_is_none(model, photos, mask, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    photos[0].save(tmp_path / "photo.png")
    mask.resize((8, 8)).save(tmp_path / "mask.png")
    common = ["--model", model, "--output", tmp_path / "a.png"]
    assert run("generate", "a cat", *common, "--image", tmp_path / "text.png") == 2
    assert "text.png' cannot be read as a picture (UnidentifiedImageError)" in capsys.readouterr().err
    assert run("generate", "a cat", *common, "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png") == 2
    assert "mask.png' is 8×8 pixels, --image 16×16; give them one size" in capsys.readouterr().err


def test_large_pictures_are_drawn_a_few_at_once():
    assert [cli.images_at_once(side, side) for side in (32, 256, 512, 768, 2048)] == [16, 16, 4, 1, 1]


def test_a_name_too_long_is_one_line(tmp_path, capsys):
    assert run("generate", "a cat", "--output", tmp_path / f"{'a' * 300}.png") == 2
    printed = capsys.readouterr().err
    assert printed.endswith("a.png' is too long for a file's name; give a shorter one\n") and printed.count("\n") == 1


def test_curves_are_a_whole_picture(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')
    assert run("plot", tmp_path, "--output", tmp_path / "loss.jpg") == 0
    assert Image.open(tmp_path / "loss.jpg").size[0] > 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        assert run("plot", tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "curves.png' could not be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.jpg", "metrics.jsonl"]


@pytest.mark.filterwarnings("default")  # under -W ignore, too
def test_a_prompt_beyond_the_context_is_drawn_with_a_warning(model, tmp_path, capsys):
    assert run("generate", "cat " * 10 + "dog", "--model", model, "--output", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").is_file()
    assert capsys.readouterr().err == "warning: prompt is beyond the 12 tokens this model reads; not read: 'dog'\n"


# ---- assemble --------------------------------------------------------------------------------------------------------


def test_the_assembled_folder_is_small_and_readable_and_draws_as_its_stages(model, pipe):
    stock = DiffusionPipeline.from_pretrained(model)
    assert {part.dtype for part in stock.components.values() if hasattr(part, "dtype")} == {torch.float32}
    stock.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "prior_num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    theirs = stock("a cat", generator=torch.Generator().manual_seed(0), **settings).images
    ours = pipe("a cat", generator=torch.Generator().manual_seed(0), num_prior_samples=1, **settings).images
    assert np.abs(theirs - ours).max() < 0.05  # weights rounded to float16
    weights = list(model.glob("*/*.safetensors"))
    assert len(weights) == 7  # those of six components, and CLIP's image tower beside them
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [model, *model.rglob("*")])
    assert not any("_name_or_path" in file.read_text() for file in model.rglob("*.json"))


@pytest.mark.parametrize(
    ("stage", "component", "change", "message"),
    [
        ("autoencoder", "vae", {"latent_channels": 8}, "in_channels is 4, but the autoencoder's latent_channels is 8"),
        ("unet", "unet", {"cross_attention_dim": 32}, "cross_attention_dim is 32, but CLIP's text width is 16"),
        ("unet", "unet", {"class_embed_type": None}, "class_embed_type is None"),
        ("unet", "unet", {"projection_class_embeddings_input_dim": 64}, "is 64, but twice CLIP's embedding size is 32"),
        ("unet", "image_normalizer", {"embedding_dim": 9}, "embedding_dim is 9, but CLIP's embedding size is 16"),
        ("prior", "prior", {"embedding_dim": 24}, "embedding_dim is 24, but CLIP's embedding size is 16"),
        ("prior", "prior", {"clip_embed_dim": 24}, "clip_embed_dim is 24, but CLIP's embedding size is 16"),
        ("prior", "prior", {"num_embeddings": 77}, "num_embeddings is 77, but CLIP's context length is 12"),
    ],
)
def test_stages_that_do_not_fit_are_named(runs, tmp_path, stage, component, change, message):
    changed = tmp_path / "changed"
    shutil.copytree(runs[stage], changed)
    file = changed / "model" / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    result = ldm("assemble", *stages(runs, **{stage: changed}), "--output", tmp_path / "out", cwd=tmp_path)
    line = refused(result)
    assert message in line and ";" in line  # what to do follows
    assert not (tmp_path / "out").exists()


def _without(name):
    return lambda run: shutil.rmtree(run / "model" / name)


def _cut(name):
    def cut(run):
        file = run / "model" / name
        file.write_bytes(file.read_bytes()[:-10])

    return cut


def _pickled(run):
    file = run / "model/unet/diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bin"))


@pytest.mark.parametrize(
    ("stage", "damage", "message"),
    [
        ("clip", _without("text_encoder"), "has no 'text_encoder' in it"),
        ("clip", _without("tokenizer"), "has no 'tokenizer' in it"),
        ("unet", _without("image_normalizer"), "has no 'image_normalizer' in it"),
        ("unet", _cut("unet/diffusion_pytorch_model.safetensors"), "is damaged: its header promises"),
        ("unet", _cut("unet/config.json"), "cannot be read"),
        ("unet", _pickled, "unet: only a pickle (.bin) is there; convert it to safetensors"),
        ("prior", lambda run: (run / "model/prior/config.json").unlink(), "component 'prior' missing: expected"),
        ("autoencoder", lambda run: shutil.rmtree(run / "model"), "has no 'vae' in it"),
        ("autoencoder", shutil.rmtree, "is not a folder"),
    ],
)
def test_a_missing_or_half_written_stage_is_named(runs, tmp_path, stage, damage, message):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs[stage], damaged)
    damage(damaged)
    result = ldm("assemble", *stages(runs, **{stage: damaged}), "--output", tmp_path / "out", cwd=tmp_path)
    line = refused(result)
    assert message in line and "damaged" in line
    assert not (tmp_path / "out").exists()


def test_an_output_in_use_is_left_alone(runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("precious")
    line = refused(ldm("assemble", *stages(runs), "--output", tmp_path / "out", cwd=tmp_path))
    assert "is already in use" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_option_left_out_is_named(runs, tmp_path):
    line = refused(ldm("assemble", *stages(runs)[2:], "--output", tmp_path / "out", cwd=tmp_path))
    assert "--autoencoder" in line


def test_weights_that_are_not_finite_leave_nothing(runs, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["autoencoder"], damaged)
    file = damaged / "model/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert run("assemble", *stages(runs, autoencoder=damaged), "--output", tmp_path / "out") == 2
    assert "'decoder.conv_in.bias' is not finite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_model_folder_itself_is_a_run(runs, tmp_path):
    inner = {stage: folder / "model" for stage, folder in runs.items()}
    (tmp_path / "out").mkdir()  # empty: may be used
    assert run("assemble", *stages(inner), "--output", tmp_path / "out") == 0
    assert (tmp_path / "out/model_index.json").is_file()


def test_a_prior_gets_a_scheduler_that_may_skip_timesteps(runs, tmp_path):
    prior = tmp_path / "prior"
    shutil.copytree(runs["prior"], prior)
    given = UnCLIPScheduler(prediction_type="sample", clip_sample_range=4.0)
    given.save_pretrained(prior / "model/prior_scheduler")
    assert run("assemble", *stages(runs, prior=prior), "--output", tmp_path / "out") == 0
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "out").prior_scheduler
    assert type(scheduler) is DDPMScheduler
    assert torch.allclose(scheduler.alphas_cumprod, given.alphas_cumprod)
    assert (scheduler.config.prediction_type, scheduler.config.clip_sample_range) == ("sample", 4.0)

    # For x₀ ~ N(μ, σ²) the best prediction is known; sampling with it must give that distribution back.
    mean, deviation = 0.7, 0.5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, generator=generator)
    scheduler.set_timesteps(25)
    for t in scheduler.timesteps:
        signal = scheduler.alphas_cumprod[t]
        gain = deviation**2 * signal.sqrt() / (signal * deviation**2 + 1 - signal)
        x = scheduler.step(mean + gain * (x - signal.sqrt() * mean), t, x, generator=generator).prev_sample
    assert abs(x.mean() - mean) < 0.03 and abs(x.std() - deviation) < 0.1
