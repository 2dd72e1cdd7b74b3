"""Numbers of a configuration are bounded before anything is built of them."""

import json

import pytest

from ldm.components.configs import read_config, read_json
from ldm.errors import UserError

UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "cross_attention_dim": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_eps": 1e-5,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "block_out_channels": [32],
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def refusal(folder, class_name, config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_config(folder, class_name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [-32, 64]}, "block_out_channels[0] must be > 0, got -32"),
        ({"block_out_channels": [32, 0]}, "block_out_channels[1] must be > 0, got 0"),
        ({"block_out_channels": [32, 2**40]}, f"block_out_channels[1] must be <= 65536, got {2**40}"),
        ({"block_out_channels": [32, 6.4]}, "block_out_channels[1] must be a whole number, got 6.4"),
        ({"block_out_channels": [32, True]}, "block_out_channels[1] must be a whole number, got True"),
        ({"block_out_channels": [32]}, "down_block_types must be a list of 1, like block_out_channels, got 2"),
        ({"block_out_channels": 32}, "block_out_channels must be a list, got 32"),
        ({"block_out_channels": []}, "block_out_channels must be a list of some"),
        ({"block_out_channels": [32] * 100_000}, "block_out_channels must have at most 64 entries, got 100000"),
        ({"layers_per_block": 1_000_000}, "layers_per_block must be <= 64, got 1000000"),
        ({"layers_per_block": 1e6}, "layers_per_block must be a whole number, got 1000000.0"),
        ({"layers_per_block": "2"}, "layers_per_block must be a whole number, got 2"),
        ({"transformer_layers_per_block": [[1, 9999]]}, "transformer_layers_per_block[0][1] must be <= 64, got 9999"),
        ({"attention_head_dim": 0}, "attention_head_dim must be > 0, got 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be > 0, got nan"),
        ({"norm_eps": float("inf")}, "norm_eps must be finite, got inf"),
        ({"in_channels": None}, "in_channels must be given, got nothing"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config must be absent, got one"),
    ],
)
def test_a_number_out_of_bounds_is_named(tmp_path, change, message):
    assert refusal(tmp_path / "unet", "UNet2DConditionModel", UNET | change).startswith(f"unet/config.json: {message}")


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_an_autoencoder_without_a_good_scaling_factor_is_refused(tmp_path, factor):
    message = refusal(tmp_path / "vae", "AutoencoderKL", VAE | {"scaling_factor": factor})
    assert message.startswith("vae/config.json: scaling_factor must be ")


def test_autoencoders_older_than_the_scaling_factor_have_stable_diffusions(tmp_path):
    folder = tmp_path / "vae"
    older = {key: value for key, value in VAE.items() if key != "scaling_factor"}
    assert "scaling_factor must be > 0, got nothing" in refusal(folder, "AutoencoderKL", older)
    for version in ("0.6.0", "0.10.0.dev0", "0.2.2"):
        (folder / "config.json").write_text(json.dumps(older | {"_diffusers_version": version}))
        read_config(folder, "AutoencoderKL")
    for version in ("0.12.0", "1.0", "", "x.y"):
        assert "scaling_factor" in refusal(folder, "AutoencoderKL", older | {"_diffusers_version": version})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": ' + b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_object_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config.json' (cannot be read|does not hold)"):
        read_json(path)


def test_a_file_too_large_for_a_configuration_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match="larger than any configuration"):
        read_json(path)
