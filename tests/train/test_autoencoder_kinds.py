"""train_autoencoder.py with the kinds of the first source document, on handwritten digits."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file

from ldm.autoencoders.denoising import DenoisingAutoencoder
from ldm.autoencoders.k_sparse import KSparseAutoencoder
from ldm.autoencoders.plain import Autoencoder
from ldm.autoencoders.sparse import SparseAutoencoder
from ldm.autoencoders.variational import VariationalAutoencoder
from pipelines.cli import main as ldm_command

CONFIGS = Path(__file__).parents[2] / "configs" / "digits"
CLASSES = {
    "plain": Autoencoder,
    "denoising": DenoisingAutoencoder,
    "sparse": SparseAutoencoder,
    "k_sparse": KSparseAutoencoder,
    "variational": VariationalAutoencoder,
}
MEASURES = {
    "plain": {"test_squared_error", "test_squared_error_masked"},
    "denoising": {"test_squared_error", "test_squared_error_masked"},
    "sparse": {"test_squared_error", "test_rho_hat", "test_rho_hat_largest_error"},
    "k_sparse": {"test_squared_error", "test_fewest_active", "test_most_active", "test_units_used"},
    "variational": {"test_elbo", "test_iwae_500", "test_bits_per_dim", "test_active_units"},
}


def arguments(kind, output, *further):
    steps = [f"training.{name}_every=2" for name in ("log", "sample", "checkpoint")]
    return ["--config", str(CONFIGS / f"{kind}.yaml"), f"output_dir={output}", "data.max_images=40",
            "training.max_steps=4", "training.batch_size=8", "training.precision=fp32", *steps, *further]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory, run_script):
    """A run of each kind, four steps."""
    folder = tmp_path_factory.mktemp("digits")
    for kind in CLASSES:
        assert run_script("autoencoder", arguments(kind, folder / kind)) == 0, kind
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_leaves_a_diffusers_model_and_what_it_measures(digits, kind):
    model: ModelMixin = CLASSES[kind].from_pretrained(digits / kind / "model" / "autoencoder")
    assert model.image_shape == (1, 8, 8)
    last = json.loads((digits / kind / "metrics.jsonl").read_text().splitlines()[-1])
    assert MEASURES[kind] <= set(last)
    assert (digits / kind / "samples" / "step-000004.png").is_file()


@pytest.mark.parametrize("kind", CLASSES)
def test_resumed_run_equals_the_uninterrupted_one(digits, run_script, logged, tmp_path, kind):
    shutil.copytree(digits / kind, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    assert run_script("autoencoder", arguments(kind, tmp_path / "run", "--resume")) == 0
    path = "model/autoencoder/diffusion_pytorch_model.safetensors"
    once, again = load_file(digits / kind / path), load_file(tmp_path / "run" / path)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert logged(digits / kind) == logged(tmp_path / "run")


def test_goes_on_from_trained_weights(digits, run_script, tmp_path):
    assert run_script("autoencoder", arguments("plain", tmp_path / "run", f"init={digits / 'plain'}")) == 0


def test_colour_images_and_convolutions(run_script, tmp_path):
    colour = ["data.source=shapes", "data.image_size=16", "test_split=null", "greyscale=false",
              "model.architecture=convolutional",
              "model.hidden_sizes=[4,8]", "model.likelihood=learned_gaussian", "model.binarise=false"]  # fmt: skip
    assert run_script("autoencoder", arguments("variational", tmp_path / "run", *colour)) == 0
    model = VariationalAutoencoder.from_pretrained(tmp_path / "run" / "model" / "autoencoder")
    assert model.image_shape == (3, 16, 16)


@pytest.mark.parametrize("kind", CLASSES)
def test_assemble_says_that_it_is_no_latent_stage(digits, runs, tmp_path, capsys, kind):
    stages = {"autoencoder": digits / kind, "clip": runs / "clip", "prior": runs / "prior", "unet": runs / "ldm"}
    options = [text for stage, run in stages.items() for text in (f"--{stage}", str(run))]
    with pytest.raises(SystemExit) as ended:
        ldm_command(["assemble", *options, "--output", str(tmp_path / "model")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert f"holds a {CLASSES[kind].__name__}" in said and "cannot be the latent stage" in said and "kind=kl" in said
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["kind=spare"], "kind must be one of .*got 'spare'; did you mean 'sparse'"),
        (["model.activation=swish"], "model: activation must be one of relu.*got 'swish'"),
        (["model.k=3"], "unknown key 'model.k'"),
        (["model.architecture=convolutional", "model.hidden_sizes=[4,4,4,4]"], "must be multiples of 16"),
        (["model.image_shape=[1,28,28]"], r"model.image_shape \[1, 28, 28\]: must be .* data.image_size 8"),
        (["data.split=validation"], "data.split of digits must be train or test, got 'validation'"),
    ],
)
def test_bad_input_is_one_line(fails, tmp_path, further, said):
    line = fails("autoencoder", arguments("plain", tmp_path / "run", *further))
    assert re.search(said, line), line
    assert not (tmp_path / "run").exists()
