"""`ldm evaluate` as a user meets it: the figures and pictures it writes, going on where it was killed, bad input."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ldm.data import shapes
from pipelines import cli, evaluate
from pipelines.card import model_card
from pipelines.evaluation.images import shapes_figures
from pipelines.evaluation.settings import claim

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")
FEW = ["--num-images", 8, "--num-inference-steps", 2, "--batch-size", 4, "--caption-template", "a {label}"]
WITH_FEATURES = {
    "Fréchet distance", "kernel distance", "precision (k = 5)", "recall (k = 5)", "density (k = 5)", "coverage (k = 5)",
    "distance to the nearest neighbour, median", "nearest-neighbour ratio, drawn to real",
    "reconstruction Fréchet distance",
}  # fmt: skip
WITH_CLIP = {"CLIP score", "R@1, picture to caption", "R@1, caption to picture"}
OF_PRIOR = {
    "cosine to the true image embedding, of the prior's",
    "cosine to the true image embedding, of the text's",
    "cosine to the true image embedding, of the mean image's",
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def refusal(capsys, *arguments: object) -> str:
    """The one line of a mistake."""
    capsys.readouterr()
    assert run("evaluate", *arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.out == "" and len(lines) == 1 and "Traceback" not in printed.err, printed.err
    return lines[0]


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assembled") / "model"
    stages = [part for stage, place in runs.items() for part in (f"--{stage}", place)]
    assert run("assemble", *stages, "--output", folder) == 0
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Cats are red and dogs are blue: 10 of each to train on, 8 to test with."""
    folder = tmp_path_factory.mktemp("pets")
    draw = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 8)):
        for word, channel in (("cat", 0), ("dog", 2)):
            (folder / split / word).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 155
                Image.fromarray(pixels).save(folder / split / word / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return _classifier(tmp_path_factory.mktemp("classifier"), side=16, resizes=True)


def _classifier(folder: Path, side: int, resizes: bool) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=side, patch_size=8,
        id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": side, "width": side}, do_resize=resizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(model, data, classifier, tmp_path_factory) -> Path:
    """A report with everything in it."""
    folder = tmp_path_factory.mktemp("reports") / "first"
    further = ["--classifier", classifier, "--steps", "2,3", "--guidance-scales", "1,3", "--curve-images", 6]
    assert run("evaluate", "--model", model, "--data", data, "--output", folder, *FEW, *further) == 0
    return folder


# ---- what it writes --------------------------------------------------------------------------------------------------


def test_every_figure_says_how_it_was_got(evaluated):
    report = report_of(evaluated)
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert WITH_FEATURES | WITH_CLIP | OF_PRIOR | {"classification accuracy", "PSNR", "SSIM"} <= set(figures)
    for name in WITH_FEATURES | WITH_CLIP | OF_PRIOR | {"classification accuracy"}:
        assert figures[name]["network"] and "sha256" in figures[name]["weights"], name
    for name, figure in figures.items():
        low, high = figure["interval"]
        assert np.isfinite(figure["value"]) and low <= high and figure["images"] >= 8, name
    assert figures["Fréchet distance"]["against"] == "20 images of train"
    assert figures["Fréchet distance"]["real"] is not None
    assert "not comparable with others' FID" in figures["Fréchet distance"]["remark"]
    median, ratio = (figures[name] for name in ("distance to the nearest neighbour, median",
                                                "nearest-neighbour ratio, drawn to real"))  # fmt: skip
    assert ratio["value"] == pytest.approx(median["value"] / median["real"]) and "copying" in ratio["remark"]
    assert "2 different captions: chance is 0.5" in figures["R@1, picture to caption"]["remark"]
    assert "8 images cannot fill the covariance" in (told := " ".join(report["warnings"])) and "kept" not in told
    assert set(report["details"]["classification accuracy of each caption, %"]) == {"a cat", "a dog"}
    settings = report["settings"]
    assert (settings["split"], settings["captions"], settings["seed"], settings["num_inference_steps"]) == (
        "test", "a {label}", 0, 2,
    )  # fmt: skip


def test_the_page_and_the_pictures(evaluated):
    page = (evaluated / "report.md").read_text()
    for name in ("samples.png", "reconstructions.png", "neighbours.png", "curves.png"):
        assert f"]({name})" in page and min(Image.open(evaluated / name).size) > 100
    for figure in report_of(evaluated)["figures"]:
        assert figure["name"] in page


def test_a_model_that_holds_its_report_tells_it_on_its_card(evaluated, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    shutil.copy(evaluated / "report.json", folder)
    line = "| Pictures drawn, Fréchet distance (8 images, against 20 images of train, the model's own CLIP) | "
    assert line in model_card(folder, "owner/model")


def test_curves_over_steps_and_guidance(evaluated):
    curves = report_of(evaluated)["curves"]
    assert [point["steps"] for point in curves["steps"]] == [2, 3]
    assert [point["guidance scale"] for point in curves["guidance scale"]] == [1, 3]
    names = {"Fréchet distance", "CLIP score", "accuracy, %"}
    assert all(names <= set(point) for points in curves.values() for point in points)
    # Its own settings are not drawn again
    drawn = {folder.name for folder in evaluated.iterdir() if folder.is_dir()}
    assert drawn == {"drawn", "drawn-num-inference-steps-3", "drawn-guidance-scale-1"}
    assert curves["steps"][0]["Fréchet distance"] == curves["guidance scale"][1]["Fréchet distance"]


def test_a_picture_is_a_function_of_seed_and_number(evaluated, model, data, tmp_path):
    """Of more pictures, in other batches, the first are the same."""
    more = ["--num-images", 9, "--num-inference-steps", 2, "--batch-size", 9, "--caption-template", "a {label}"]
    assert run("evaluate", "--model", model, "--data", data, "--output", tmp_path / "more", *more) == 0
    pictures = [np.asarray(Image.open(f / "drawn/000007.png")).astype(int) for f in (evaluated, tmp_path / "more")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 0


def test_one_that_was_killed_goes_on_and_counts_nothing_twice(evaluated, model, data, classifier, tmp_path):
    output, place = tmp_path / "killed", tmp_path / "stderr"
    arguments = ["evaluate", "--model", model, "--data", data, "--output", output, *FEW, "--classifier", classifier]
    arguments += ["--steps", "2,3", "--guidance-scales", "1,3", "--curve-images", 6]
    with place.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
            cwd=Path(cli.__file__).parents[1],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=errors,
            stderr=errors,
        )
        while process.poll() is None and len(list((output / "drawn").glob("[0-9]*.png"))) < 4:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "report.json").exists(), place.read_text()
    kept = {path: path.stat().st_mtime_ns for path in (output / "drawn").glob("[0-9]*.png")}
    (output / "drawn" / "000000.png").write_bytes(b"\x89PNG, cut")  # as a machine that fell over may leave it
    kept.pop(output / "drawn" / "000000.png")
    assert run(*arguments) == 0
    assert all(path.stat().st_mtime_ns == since for path, since in kept.items())
    whole, again = report_of(evaluated), report_of(output)
    assert again["figures"] == whole["figures"] and again["curves"] == whole["curves"]
    for path in (evaluated / "drawn").iterdir():
        assert path.read_bytes() == (output / "drawn" / path.name).read_bytes()
    assert sorted(path.name for path in (output / "drawn").iterdir()) == [f"{n:06d}.png" for n in range(8)]


def test_what_is_amiss_with_the_data_is_told(model, data, tmp_path):
    damaged = shutil.copytree(data / "train", tmp_path / "data")  # and of one split, which may have been trained on
    (damaged / "cat" / "0.png").write_bytes(b"\x89PNG, cut")
    assert run("evaluate", "--model", model, "--data", damaged, "--output", tmp_path / "report", *FEW) == 0
    told = ("of the images of train, 1 cannot be decoded", "nothing says that these images (train) were kept from")
    assert all(words in (tmp_path / "report" / "report.md").read_text() for words in told)


def test_two_reports_are_compared(evaluated, tmp_path, capsys):
    other = tmp_path / "second"
    other.mkdir()
    report = report_of(evaluated)
    report["figures"][0] |= {"value": 1e-3, "interval": [0, 2e-3]}
    (other / "report.json").write_text(json.dumps(report | {"model": "better"}))
    Image.new("RGB", (50, 50)).save(other / "samples.png")
    capsys.readouterr()
    assert run("evaluate", "--compare", evaluated, other, "--output", tmp_path / "both") == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "Fréchet distance (the model's own CLIP)" in line)
    assert line.endswith("| better |")
    assert (tmp_path / "both" / "comparison.md").read_text() == printed
    assert Image.open(tmp_path / "both" / "comparison.png").width > 50
    page = tmp_path / "both" / "comparison.md"
    assert f"--output '{page}' cannot be written" in refusal(capsys, "--compare", evaluated, other, "--output", page)
    assert "--num-images is of no use" in refusal(capsys, "--compare", evaluated, other, "--num-images", 7)


def test_two_models_are_evaluated_and_compared(model, data, tmp_path, capsys):
    few = ["--num-images", 6, "--num-inference-steps", 1, "--caption-template", "a {label}", "--steps", 1]
    other = shutil.copytree(model, tmp_path / "other")
    common = ["--data", data, "--output", tmp_path / "both", *few]
    assert "model_index.json' is missing" in refusal(capsys, "--compare", model, data, *common)
    assert not (tmp_path / "both").exists()  # told before the first is judged
    assert run("evaluate", "--compare", model, other, *common) == 0
    assert report_of(tmp_path / "both" / "A")["settings"]["curve_images"] == 6  # no more than are drawn
    assert all((tmp_path / "both" / name / "report.md").is_file() for name in ("A", "B"))
    assert "# model and other" in capsys.readouterr().out


def test_a_model_of_pixels_has_a_likelihood(classifier, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {
        "sample_size": 8,
        "in_channels": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    unet = UNet2DModel(
        out_channels=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=11, **sizes
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "model")
    classes = ["", *(f"the digit {number}" for number in range(10))]
    (tmp_path / "model" / "classes.json").write_text(json.dumps(classes))
    few = ["--num-images", 10, "--guidance-scale", 2]
    arguments = ["evaluate", "--model", tmp_path / "model", "--data", "digits", "--output", tmp_path / "report", *few]
    assert run(*arguments) == 0
    report = report_of(tmp_path / "report")
    (figure,) = [figure for figure in report["figures"] if figure["part"] == "Likelihood"]
    assert figure["unit"] == "bits/dim" and 0 < figure["value"] < np.inf
    assert any("name a network, such as --features inception" in warning for warning in report["warnings"])
    assert run(*arguments) == 0  # nothing is drawn again
    assert report_of(tmp_path / "report")["figures"] == report["figures"]
    assert "--steps: nothing here tells the quality" in refusal(capsys, *arguments[1:], "--steps", 5)
    (tmp_path / "model" / "classes.json").unlink()
    assert "this model knows none" in refusal(capsys, *arguments[1:-2], "--classifier", classifier)


def test_true_scenes_show_their_captions():
    scenes = [shapes.make_scene(3, number) for number in range(20)]
    drawn = torch.stack([torch.from_numpy(np.array(shapes.draw(scene, 48))).permute(2, 0, 1) for scene in scenes])
    captions = [scene.caption for scene in scenes]
    assert {figure.value for figure in shapes_figures(drawn, captions, seed=0)} == {100.0}
    figures = {figure.name: figure.value for figure in shapes_figures(drawn, captions[1:] + captions[:1], seed=0)}
    assert figures["colours, shapes and places right"] < 20


# ---- bad input -------------------------------------------------------------------------------------------------------


MISTAKES = [
    (["--output", "new"], "--data is missing"),
    (["--data", "", "--output", "new"], "--data '' is empty; give a name"),
    (["--data", "shapes"], "--output is missing"),
    (["--data", "shapes", "--output", "new", "--curve-images", "9"], "--curve-images belongs to a curve"),
    (["--data", "shapes", "--output", "new", "--num-images", "5"], "--num-images is 5; precision and recall"),
    (["--data", "shapes", "--output", "new", "--num-images", "9" * 9], "--num-images is 999999999; it must be a whole"),
    (["--data", "shapes", "--output", "new", "--batch-size", "0"], "--batch-size is 0"),
    (["--data", "shapes", "--output", "new", "--seed", "-1"], "--seed is -1"),
    (["--data", "shapes", "--output", "new", "--steps", "5,0"], "--steps is 0"),
    (["--data", "shapes", "--output", "new", "--steps", "5;6"], "'5;6' is no list of numbers"),
    (["--data", "shapes", "--output", "new", "--guidance-scales", "1,nan"], "--guidance-scales is nan"),
    (["--data", "shapes", "--output", "file"], "--output 'file' is a file"),
    (["--data", "shapes", "--output", "used"], "--output 'used' is already in use, and by no evaluation"),
    (["--data", "shapes", "--output", "new", "--model", "nowhere"], "model folder 'nowhere' does not exist"),
    (["--model", "a", "--compare", "a", "b"], "--model and --compare exclude each other"),
    (["--compare", "a", "b"], "--data is missing (--compare was not given two folders that hold a report.json)"),
    (["--data", "shapes", "--output", "new", "--caption-column", "a", "--caption-template", "b"], "exclude each"),
    (["--data", "shapes", "--output", "new", "--caption-column", "a", "--label-names", "b,c"], "exclude each other"),
    (["--data", "shapes", "--output", "new", "--label-names", "b,,c"], "'b,,c' is no list of names"),
    (["--data", "shapes", "--output", "new", "--feature", "x"], "did you mean '--features'?"),
]
"""Arguments, and what is said of them."""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> list[tuple[int, str, str]]:
    """Of each of `MISTAKES` the exit code, and what was printed on standard output and error, by one process in which
    nothing heavy can be imported."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "file").touch()
    (folder / "used").mkdir()
    (folder / "used" / "precious").touch()
    script = """
import contextlib, io, json, sys
heavy, mistakes = json.load(sys.stdin)
for name in heavy: sys.modules[name] = None
from pipelines.cli import main
for arguments in mistakes:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(["evaluate", *arguments])
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), errors.getvalue()]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([HEAVY, [arguments for arguments, _ in MISTAKES]]),
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["file", "used"]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[message for _, message in MISTAKES])
def test_mistakes_are_told_before_anything_heavy(told, number):
    code, printed, errors = told[number]
    assert code == 2 and printed == "" and errors.count("\n") == 1, errors
    assert MISTAKES[number][1] in errors


def test_what_the_data_lack_is_told(model, data, tmp_path, capsys):
    common = ["--model", model, "--output", tmp_path / "report"]
    assert "--steps is 5000" in refusal(capsys, *common, "--data", data, "--steps", "5,5000")
    assert f"--split 'other': {data} has " in refusal(capsys, *common, "--data", data, "--split", "other")
    assert "--against 'other'" in refusal(capsys, *common, "--data", data, "--against", "other")
    assert "name 'kind'" in refusal(capsys, *common, "--data", data, "--caption-template", "a {kind}")
    (tmp_path / "bare").mkdir()
    for number in range(7):
        Image.new("RGB", (16, 16), (number,) * 3).save(tmp_path / "bare" / f"{number}.png")
    assert "holds no captions, only image; put that of each name.png" in refusal(
        capsys, *common, "--data", tmp_path / "bare"
    )
    for number in range(3):
        (tmp_path / "bare" / f"{number}.txt").write_text("a cat")
    assert "has 3 images in all; precision and recall" in refusal(capsys, *common, "--data", tmp_path / "bare")
    for number in range(3, 7):
        (tmp_path / "bare" / f"{number}.txt").write_text("x" * 100_001)
    assert "has 100001 characters" in refusal(capsys, *common, "--data", tmp_path / "bare")
    assert "no such folder" in refusal(capsys, *common, "--data", tmp_path / "nowhere")
    assert "'~nobody-here' is none of" in refusal(capsys, *common, "--data", data, "--features", "~nobody-here")
    assert not (tmp_path / "report").exists()
    inside = ["--model", model, "--output", model / "unet" / "report", "--data", data]
    assert "is in the model's folder" in refusal(capsys, *inside)


def test_networks_that_do_not_fit_are_told(model, data, classifier, tmp_path, capsys):
    common = ["--model", model, "--data", data, "--output", tmp_path / "report", *FEW]
    other = _classifier(tmp_path / "other", side=24, resizes=False)
    for option in ("--features", "--classifier"):
        line = refusal(capsys, *common, option, other)
        assert f"{option} '{other}' reads 24×24 pixels, and the pictures have 16×16" in line
    assert f"--clip '{classifier}' is no folder of CLIP's two towers" in refusal(capsys, *common, "--clip", classifier)
    assert "nowhere" in refusal(capsys, *common, "--features", tmp_path / "nowhere")
    unnamed = [*common, "--classifier", classifier, "--caption-template", "nothing"]
    assert "no caption names a label of the classifier" in refusal(capsys, *unnamed)
    assert not (tmp_path / "report").exists()


def test_another_evaluation_is_not_mixed_in(evaluated, model, data, capsys):
    line = refusal(capsys, "--model", model, "--data", data, "--output", evaluated, *FEW, "--seed", 3)
    assert "is of another evaluation: seed 0, now 3" in line and "steps [2, 3], now None" in line
    assert "captions_sha256" in line


def test_settings_are_compared_as_they_are_written(tmp_path):
    claim(tmp_path / "a", {"interval": (0.0, 1.0), "name": "ü"})
    claim(tmp_path / "a", {"interval": (0.0, 1.0), "name": "ü"})
    assert json.loads((tmp_path / "a" / "settings.json").read_text()) == {"interval": [0.0, 1.0], "name": "ü"}


def test_every_option_is_explained():
    parser = argparse.ArgumentParser()
    evaluate.add_command(parser.add_subparsers(), Path())
    (commands,) = parser._subparsers._group_actions
    assert all(action.help for action in commands.choices["evaluate"]._actions)
