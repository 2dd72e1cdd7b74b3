"""A folder with any fault is refused in one line, by the class and by the command line; a whole one is opened."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from ldm.errors import UserError
from pipelines import LatentDiffusionPipeline, LatentDiffusionPriorPipeline, cli

UNET = "unet/diffusion_pytorch_model.safetensors"
FAST = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        LatentDiffusionPipeline.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _truncated(folder):
    path = folder / UNET
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    return (
        f"{UNET} is damaged: its header promises {len(whole)} bytes, the file has {len(whole) - 1000}. "
        "Download it again."
    )


def _html(folder):
    page = b"<!DOCTYPE html><html><body>Not found</body></html>"
    (folder / UNET).write_bytes(page)
    promised = 8 + int.from_bytes(page[:8], "little")
    return f"{UNET} is damaged: its header promises {promised} bytes, the file has {len(page)}. Download it again."


def _corrupt_bit(folder):
    content = bytearray((folder / UNET).read_bytes())
    content[content.index(b'"shape"')] ^= 1
    (folder / UNET).write_bytes(content)
    return f"{UNET} is damaged: its header cannot be read. Download it again."


def _no_folder(folder):
    shutil.rmtree(folder / "unet")
    return f"component 'unet' missing: expected {folder / 'unet'}"


def _no_weights(folder):
    (folder / UNET).unlink()
    return f"component 'unet' missing: expected {folder / UNET}"


def _no_config(folder):
    (folder / "vae/config.json").unlink()
    return f"component 'vae' missing: expected {folder / 'vae/config.json'}"


def _no_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    return f"component 'tokenizer' missing: expected {folder / 'tokenizer'}"


def _no_scheduler_config(folder):
    (folder / "scheduler/scheduler_config.json").unlink()
    return f"component 'scheduler' missing: expected {folder / 'scheduler/scheduler_config.json'}"


def _component_not_named(folder):
    edit(folder / "model_index.json", vae=[None, None])
    return f"'{folder}' is a StableUnCLIPPipeline without 'vae'"


def _shapes(folder):
    edit(folder / "unet/config.json", block_out_channels=[12, 16])
    return "unet: config and weights disagree: conv_in.weight expects (12, 4, 3, 3), the file has (8, 4, 3, 3)"


def _missing_key(folder):
    edit_weights(folder / UNET, lambda tensors: tensors.pop("conv_in.weight"))
    return "unet: config and weights disagree: conv_in.weight expects (8, 4, 3, 3), the file has nothing"


def _unexpected_key(folder):
    edit_weights(folder / UNET, lambda tensors: tensors.update(extra=torch.zeros(2, 3)))
    return "unet: config and weights disagree: extra expects nothing, the file has (2, 3)"


def _text_key(folder):
    def drop(tensors):
        tensors.pop(next(key for key in tensors if key.endswith("final_layer_norm.weight")))

    edit_weights(folder / "text_encoder/model.safetensors", drop)
    return "text_encoder: config and weights disagree: final_layer_norm.weight expects (16), the file has nothing"


def _vae_folder_for_unet(folder):
    shutil.rmtree(folder / "unet")
    shutil.copytree(folder / "vae", folder / "unet")
    return "'unet' must be UNet2DConditionModel, got AutoencoderKL"


def _vae_weights_for_unet(folder):
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / UNET)
    return "unet: config and weights disagree: "


def _wrong_class_in_index(folder):
    edit(folder / "model_index.json", unet=["diffusers", "AutoencoderKL"])
    return "'unet' must be UNet2DConditionModel, got AutoencoderKL"


def _code_in_index(folder):
    (folder / "unet/net.py").write_text("raise SystemExit('ran')")
    edit(folder / "model_index.json", unet=["net", "UNet2DConditionModel"])
    return "'unet' must be UNet2DConditionModel, got net.UNet2DConditionModel"


def _swapped_scheduler(folder):
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    return "'scheduler' must be DDIMScheduler, got EulerDiscreteScheduler"


def _scheduler_of_flows(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    return (
        "'scheduler' must be a Karras-compatible scheduler such as DDIMScheduler, got FlowMatchEulerDiscreteScheduler"
    )


def _long_schedule(folder):
    edit(folder / "scheduler/scheduler_config.json", num_train_timesteps=10**9)
    return "scheduler/scheduler_config.json: num_train_timesteps must be <= 100000, got 1000000000"


def _negative_channels(folder):
    edit(folder / "unet/config.json", block_out_channels=[-32, 16])
    return "unet/config.json: block_out_channels[0] must be > 0, got -32"


def _a_million_layers(folder):
    edit(folder / "unet/config.json", layers_per_block=10**6)
    return "unet/config.json: layers_per_block must be <= 64, got 1000000"


def _huge_but_allowed(folder):
    edit(folder / "prior/config.json", num_layers=2, num_attention_heads=2**16, attention_head_dim=2**12)
    return "prior: config and weights disagree: "


def _impossible(folder):
    edit(folder / "vae/config.json", act_fn="no such function")
    return "vae/config.json: no AutoencoderKL can be built of it ("


def _pickle_only(folder):
    (folder / UNET).rename((folder / UNET).with_suffix(".bin"))
    return "unet: only a pickle (.bin) is there; convert it to safetensors"


def _not_finite(folder):
    edit_weights(folder / UNET, lambda tensors: tensors["conv_in.weight"][0, 0, 0].fill_(float("nan")))
    return "unet: 'conv_in.weight' is not finite"


def _scaling_factor(folder):
    edit(folder / "vae/config.json", scaling_factor=float("nan"))
    return "vae/config.json: scaling_factor must be > 0, got nan"


def _context(folder):
    edit(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    return "tokenizer/tokenizer_config.json: model_max_length must be from 3 to 12"


def _other_latents(folder):
    parts = json.loads((folder / "vae/config.json").read_text())
    other = AutoencoderKL.from_config(parts | {"latent_channels": 8})
    other.save_pretrained(folder / "vae")
    return "unet/config.json: in_channels must be 8 or 16 or 17 (the latent_channels of vae, "


def _other_text(folder):
    edit(folder / "text_encoder/config.json", hidden_size=24)
    return "unet/config.json: cross_attention_dim must be 24 (the hidden_size of text_encoder), got 16"


def _other_embedding(folder):
    edit(folder / "prior_text_encoder/config.json", projection_dim=24)
    return "prior/config.json: embedding_proj_dim must be 24 (the projection_dim of prior_text_encoder), got 16"


def _other_normalizer(folder):
    edit(folder / "image_normalizer/config.json", embedding_dim=24)
    return "unet/config.json: projection_class_embeddings_input_dim must be 48 (twice the embedding_dim"


def _settings(folder, settings, fault):
    edit(folder / "model_index.json", _default_settings=settings)
    return f"'{folder / 'model_index.json'}', _default_settings: {fault}"


def _setting_of_a_text(folder):
    return _settings(folder, {"guidance_scale": "3"}, "guidance_scale is '3'; it must be a finite number >= 0")


def _unknown_setting(folder):
    return _settings(folder, {"num_steps": 3}, "unknown setting 'num_steps'; did you mean 'num_inference_steps'?")


def _settings_that_are_a_list(folder):
    return _settings(folder, [20, 3.0], "default settings are a list; give a dictionary of num_inference_steps, ")


def _more_steps_than_there_are(folder):
    return _settings(folder, {"prior_num_inference_steps": 101}, "prior_num_inference_steps is 101; it must be a whole")


def _other_vocabulary(folder):
    edit(folder / "text_encoder/config.json", vocab_size=20)
    return "'tokenizer' must have ids below 20 (the tower's vocab_size), got "


FAULTS = (
    _truncated,
    _html,
    _corrupt_bit,
    _no_folder,
    _no_weights,
    _no_config,
    _no_tokenizer,
    _no_scheduler_config,
    _component_not_named,
    _shapes,
    _missing_key,
    _unexpected_key,
    _text_key,
    _vae_folder_for_unet,
    _vae_weights_for_unet,
    _wrong_class_in_index,
    _code_in_index,
    _swapped_scheduler,
    _scheduler_of_flows,
    _long_schedule,
    _negative_channels,
    _a_million_layers,
    _huge_but_allowed,
    _impossible,
    _pickle_only,
    _not_finite,
    _scaling_factor,
    _context,
    _other_latents,
    _other_text,
    _other_embedding,
    _other_normalizer,
    _other_vocabulary,
    _setting_of_a_text,
    _unknown_setting,
    _settings_that_are_a_list,
    _more_steps_than_there_are,
)


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__[1:])
def test_a_fault_is_told_in_one_line(folder, tmp_path, capsys, damage):
    """By the class and by the command line, which writes nothing then."""
    message = damage(folder)
    said = refusal(folder)
    assert said.startswith(message)
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "a cat", "--model", str(folder), "--output", str(tmp_path / "cat.png")])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")
    assert not (tmp_path / "cat.png").exists()


@pytest.mark.parametrize("damage", [_a_million_layers, _shapes, _html, _vae_weights_for_unet, _other_latents])
def test_a_fault_is_told_before_torch_is_there(folder, tmp_path, damage):
    message = damage(folder)
    script = (
        "import sys; from pipelines import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: print(*({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    arguments = ["generate", "a cat", "--model", str(folder), "--output", str(tmp_path / "cat.png")]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "\n")
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


# ---- what is whole ---------------------------------------------------------------------------------------------------


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **FAST).images


def test_shards_and_variants_are_opened(pipe, folder, tmp_path):
    expected = draw(LatentDiffusionPipeline.from_pretrained(folder))
    assert np.allclose(expected, draw(pipe), atol=1e-5)
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards/unet").glob("*-of-*.safetensors"))) > 1
    assert np.allclose(draw(LatentDiffusionPipeline.from_pretrained(tmp_path / "shards")), expected, atol=1e-5)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert "only the variant 'fp16' is there" in refusal(tmp_path / "half")
    opened = LatentDiffusionPipeline.from_pretrained(tmp_path / "half", variant="fp16")
    assert np.allclose(draw(opened), expected, atol=1e-5)
    (damaged,) = (tmp_path / "half/unet").glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "diffusion_pytorch_model.fp16.safetensors is damaged" in refusal(tmp_path / "half", variant="fp16")


def test_what_is_given_need_not_be_in_the_folder(pipe, folder):
    shutil.rmtree(folder / "vae")
    assert LatentDiffusionPipeline.from_pretrained(folder, vae=pipe.vae).vae is pipe.vae
    shutil.rmtree(folder / "prior")
    opened = LatentDiffusionPipeline.from_pretrained(folder, vae=pipe.vae, prior=None)
    assert opened.prior is None and opened.commit is None


def test_names_of_older_releases_are_known(folder):
    """Stable Diffusion 1.x: the autoencoder's attention, and positions stored with the text tower."""

    def older(tensors):
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            for key in [key for key in tensors if f".{new}." in key]:
                tensors[key.replace(new, old)] = tensors.pop(key)

    def positions(tensors):
        for key in list(tensors):
            tensors[f"text_model.{key.removeprefix('text_model.')}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]

    expected = draw(LatentDiffusionPipeline.from_pretrained(folder))
    edit_weights(folder / "vae/diffusion_pytorch_model.safetensors", older)
    edit_weights(folder / "text_encoder/model.safetensors", positions)
    assert np.allclose(draw(LatentDiffusionPipeline.from_pretrained(folder)), expected, atol=1e-5)


def test_a_safety_checker_is_passed_over(folder):
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    LatentDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"custom_pipeline": "someone_elses"}, "custom_pipeline is not taken"),
        ({"trust_remote_code": True}, "trust_remote_code is not taken"),
        ({"use_safetensors": False}, "use_safetensors must be True"),
    ],
)
def test_no_code_and_no_pickle_by_request_either(folder, options, message):
    assert message in refusal(folder, **options)
    edit(folder / "model_index.json", _class_name="KandinskyPriorPipeline")  # which is opened in a way of its own
    with pytest.raises(UserError, match=message):
        LatentDiffusionPriorPipeline.from_pretrained(folder, **options)
