"""What the user gave and cannot be used: one line, exit code 2, and nothing written."""

import json
import shutil

import pytest
from PIL import Image

from ldm.config import ClipConfig
from ldm.data.latents import read_index
from train.train_clip import check_agrees


@pytest.fixture
def tree(tmp_path):
    """Every file there with its bytes."""
    return lambda folder: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unknown_key(runs, arguments_of, fails, tmp_path):
    line = fails("ldm", arguments_of("ldm", runs, tmp_path / "run", "training.learning_rat=1"))
    assert "training.learning_rat" in line and "'training.learning_rate'" in line
    line = fails("ldm", arguments_of("ldm", runs, tmp_path / "run", "model.layers_per_blok=1"))
    assert "model.layers_per_blok" in line and "'layers_per_block'" in line
    assert not (tmp_path / "run").exists()


def test_unknown_option(runs, arguments_of, fails, tmp_path):
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", "--resum"))
    assert "--resum" in line and "'--resume'" in line


def test_config_that_is_not_there(fails, tmp_path):
    assert "no such file" in fails("clip", ["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("clip", "training.batch_size=0"),
        ("clip", "training.gradient_accumulation_steps=2"),
        ("clip", "model.patch_size=5"),
        ("autoencoder", "kl_weight=-1"),
        ("prior", "caption_dropout=1.5"),
        ("ldm", "prediction_type=x0"),
        ("ldm", "training.gradient_accumulation_steps=3"),
        ("ldm", "training.learning_rate=fast"),
    ],
)
def test_value_out_of_range(runs, arguments_of, fails, tmp_path, stage, override):
    line = fails(stage, arguments_of(stage, runs, tmp_path / "run", override))
    name, _, value = override.partition("=")
    assert name.rpartition(".")[2] in line and value in line
    assert not (tmp_path / "run").exists()


def test_missing_column_lists_those_there_are(runs, arguments_of, fails, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "words": "a square"} for number in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = arguments_of("autoencoder", runs, tmp_path / "run", f"data.source={folder}", "data.caption_column=text")
    line = fails("autoencoder", arguments)
    assert "'text'" in line and "image, words" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "option"), [("cache", "autoencoder"), ("prior", "clip"), ("ldm", "autoencoder")])
def test_missing_stage_folder(runs, arguments_of, fails, tmp_path, stage, option):
    line = fails(stage, arguments_of(stage, runs, tmp_path / "run", f"{option}={tmp_path / 'absent'}"))
    assert option in line and str(tmp_path / "absent") in line
    assert not (tmp_path / "run").exists()


def test_half_written_stage_folder(runs, arguments_of, fails, tmp_path):
    shutil.copytree(runs / "autoencoder" / "model", tmp_path / "autoencoder" / "model")
    weights = tmp_path / "autoencoder" / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    arguments = arguments_of("ldm", runs, tmp_path / "run", f"autoencoder={tmp_path / 'autoencoder'}")
    line = fails("ldm", arguments)
    assert f"{weights.parent.name}/{weights.name} is damaged: its header promises" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.image_size=30", "data.image_size 30: the autoencoder halves images to a 4th"),
        ("model.use_quant_conv=false", "model.use_quant_conv and use_post_quant_conv must be true"),
    ],
)
def test_autoencoders_that_could_not_be_left(runs, arguments_of, fails, tmp_path, override, words):
    """Told before the first step, not when the weights are to be written."""
    assert words in fails("autoencoder", arguments_of("autoencoder", runs, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["prior", "ldm"])
def test_data_that_are_not_read(runs, arguments_of, fails, tmp_path, stage):
    """Both stages read a cache alone; what it holds was settled when that was written."""
    line = fails(stage, arguments_of(stage, runs, tmp_path / "run", "data.horizontal_flip=true", "data.num_workers=1"))
    assert "data.horizontal_flip True: this stage reads no images but their cache" in line
    assert not (tmp_path / "run").exists()


def test_half_written_cache(runs, arguments_of, fails, tmp_path):
    shutil.copytree(runs / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "index.json").unlink()
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", f"cache={tmp_path / 'cache'}"))
    assert str(tmp_path / "cache") in line and "not finished" in line


def test_cache_of_other_encoders(runs, arguments_of, run_script, fails, tmp_path):
    arguments = arguments_of("autoencoder", runs, tmp_path / "other", "seed=1", "training.max_steps=1")
    assert run_script("autoencoder", arguments) == 0
    line = fails("ldm", arguments_of("ldm", runs, tmp_path / "run", f"autoencoder={tmp_path / 'other'}"))
    assert "another autoencoder" in line and str(tmp_path / "other") in line


def test_weights_to_start_from_that_do_not_fit(runs, arguments_of, run_script, fails, tmp_path):
    """Another CLIP has wider embeddings: neither U-Net nor prior of the first can go on with it."""
    wide = ["model.embedding_dim=32", "model.text_width=32", "training.max_steps=1"]
    assert run_script("clip", arguments_of("clip", runs, tmp_path / "clip", *wide)) == 0
    others = [f"clip={tmp_path / 'clip'}", f"cache={tmp_path / 'cache'}"]
    assert run_script("cache", arguments_of("cache", runs, tmp_path / "cache", others[0])) == 0
    line = fails("ldm", arguments_of("ldm", runs, tmp_path / "run", *others, f"init={runs / 'ldm'}"))
    assert "cross_attention_dim 16" in line and "32" in line
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", *others, f"init={runs / 'prior'}"))
    assert "embedding_dim 16" in line and "32" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "override", "words"),
    [
        ("clip", "model.text_layers=2", "model.text_layers 2: the CLIP of init {init} has 1"),
        ("clip", "model.mlp_ratio=4.1", "model.mlp_ratio 4.0625: the CLIP of init {init} has 4.0"),
        ("clip", "context_length=20", "context_length 20: the CLIP of init {init} has 16"),
        ("clip", "vocabulary_size=515", "vocabulary_size 515: the CLIP of init {init} has 5"),
        ("autoencoder", "model.layers_per_block=3", "model.layers_per_block 3: the autoencoder of init {init} has 1"),
        ("prior", "model.num_layers=2", "model.num_layers 2: the prior of init {init} has 1"),
        ("ldm", "model.block_out_channels=[16,64]", "model.block_out_channels [16, 64]: the U-Net of init {init} has"),
    ],
)
def test_another_network_than_that_to_start_from(runs, arguments_of, fails, tmp_path, stage, override, words):
    init = runs / stage
    line = fails(stage, arguments_of(stage, runs, tmp_path / "run", f"init={init}", override))
    assert words.format(init=init) in line
    assert not (tmp_path / "run").exists()


def test_a_ratio_that_makes_the_same_network_agrees():
    """open_clip cuts 16 · 4.03 to the 64 units that there are."""
    config = ClipConfig(output_dir="run", init="clip", model={"mlp_ratio": 4.03})
    check_agrees(config, {"vision_width": 16, "mlp_ratio": 4.0})


@pytest.mark.parametrize("stage", ["clip", "autoencoder", "prior", "ldm"])
def test_folder_in_use_is_left_as_it_is(runs, arguments_of, fails, tree, stage):
    before = tree(runs / stage)
    line = fails(stage, arguments_of(stage, runs, runs / stage))
    assert str(runs / stage) in line and "already in use" in line
    assert tree(runs / stage) == before


@pytest.mark.parametrize("stage", ["clip", "cache"])
def test_output_that_is_a_file(runs, arguments_of, fails, tmp_path, stage):
    (tmp_path / "file").write_text("mine")
    assert "already in use" in fails(stage, arguments_of(stage, runs, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_with_something_beside_a_cache(runs, arguments_of, fails, tree, tmp_path):
    shutil.copytree(runs / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "letter.txt").write_text("mine")
    before = tree(tmp_path / "cache")
    line = fails("cache", arguments_of("cache", runs, tmp_path / "cache"))
    assert "already in use" in line and "letter.txt is no part of a cache" in line
    assert tree(tmp_path / "cache") == before


def test_cache_of_an_earlier_format(runs, arguments_of, fails, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "images-00000.safetensors").write_text("")
    assert "an earlier format; delete it" in fails("cache", arguments_of("cache", runs, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.horizontal_flip=true", "horizontal_flip False, not True"),
        ("precision", "images cached with another precision"),
        ("autoencoder", "images cached with another autoencoder"),
    ],
)
def test_cache_with_other_settings(runs, arguments_of, run_script, fails, tree, tmp_path, override, words):
    if override == "autoencoder":
        arguments = arguments_of("autoencoder", runs, tmp_path / "other", "seed=1", "training.max_steps=1")
        assert run_script("autoencoder", arguments) == 0
        override = f"autoencoder={tmp_path / 'other'}"
    if override == "precision":  # the one that `auto` did not choose on this machine
        override = f"precision={'fp32' if read_index(runs / 'cache').image_settings.precision == 'bf16' else 'bf16'}"
    before = tree(runs / "cache")
    line = fails("cache", arguments_of("cache", runs, runs / "cache", override))
    assert words in line and "delete that folder" in line
    assert tree(runs / "cache") == before


def test_nothing_to_resume(runs, arguments_of, fails, tmp_path):
    line = fails("prior", arguments_of("prior", runs, tmp_path / "run", "--resume"))
    assert str(tmp_path / "run") in line and "without --resume" in line
    assert not (tmp_path / "run").exists()
