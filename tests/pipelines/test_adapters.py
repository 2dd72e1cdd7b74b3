"""Adapters as users bring them: what is opened, what is refused, and what the pipelines do with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import pipelines
from ldm import hub as ldm_hub
from ldm.errors import UserError
from ldm.lora_config import LoraConfig
from ldm.training.lora import AdaptedUNet, add_adapters, save_adapters
from pipelines import LatentDiffusionPipeline, LatentDiffusionPriorPipeline, cli

CONFIG = LoraConfig(rank=3, alpha=6.0)
UP = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.up.weight"
DOWN = UP.replace(".up.", ".down.")
TEXT_UP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"
RESOLVE = """
import sys
from ldm.errors import exit_code_of
from ldm.hub import resolve_adapters
sys.exit(exit_code_of(lambda: print(resolve_adapters("user/adapters", sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def own(model) -> LatentDiffusionPipeline:
    """A pipeline of the test's own."""
    own = LatentDiffusionPipeline.from_pretrained(model)
    own.set_progress_bar_config(disable=True)
    return own


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> Path:
    """A folder with random adapters for both networks."""
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    torch.manual_seed(3)
    add_adapters(pipe.unet, CONFIG, "target_modules")
    add_adapters(pipe.text_encoder, CONFIG, "text_target_modules")
    network = AdaptedUNet(pipe.unet, pipe.text_encoder)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(network, CONFIG, folder)
    return folder


@pytest.fixture
def changed(adapters, tmp_path):
    """(change) -> the adapters' file after change(tensors), their metadata as they were, or as given."""

    def write(change, metadata=None):
        path = tmp_path / "changed.safetensors"
        tensors = load_file(adapters / ldm_hub.ADAPTERS)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
        return path

    return write


def draw(pipe, **options) -> np.ndarray:
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"} | options
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **settings).images


def test_only_adapters_are_trained_and_the_base_stays(own):
    before = {name: value.clone() for name, value in own.unet.state_dict().items()}
    add_adapters(own.unet, CONFIG, "target_modules")
    network = AdaptedUNet(own.unet, None)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(2):
        torch.manual_seed(0)
        output = network(torch.randn(1, 4, 8, 8), 5, encoder_hidden_states=torch.randn(1, 12, 16),
                         class_labels=torch.randn(1, 32)).sample  # fmt: skip
        output.square().mean().backward()
        optimizer.step()
    now = {name.replace(".base_layer", ""): value for name, value in own.unet.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert len(now) == len(before) + len(trained) and all(value.any() for value in trained)


def test_every_pipeline_that_draws_takes_them():
    for name in pipelines.__all__:
        assert hasattr(getattr(pipelines, name), "load_lora_weights") == (name != "LatentDiffusionPriorPipeline")
    assert not hasattr(LatentDiffusionPriorPipeline, "fuse_lora")


@pytest.mark.parametrize("kind", ["run", "folder", "file", "tensors"])
def test_what_adapters_may_be(own, adapters, kind, tmp_path):
    before = draw(own)
    if kind == "run":
        source = shutil.copytree(adapters, tmp_path / "run" / "model").parent
    else:
        path = adapters / ldm_hub.ADAPTERS
        source = {"folder": adapters, "file": str(path), "tensors": load_file(path)}[kind]
    own.load_lora_weights(source, adapter_name="mine")
    assert own.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}
    scale = 6 / 3 if kind != "tensors" else 1.0  # the file's metadata have α
    assert own.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.scaling["mine"] == scale
    assert np.abs(draw(own) - before).max() > 1 / 255


def test_a_scale_reaches_the_text_encoder_too(own, adapters):
    own.load_lora_weights(adapters)
    tokens = []
    for scale in (1.0, 0.5, 0.0):
        draw(own, cross_attention_kwargs={"scale": scale}, callback_on_step_end_tensor_inputs=("prompt_embeds",),
             callback_on_step_end=lambda pipe, step, t, given: tokens.append(given["prompt_embeds"]))  # fmt: skip
    full, half, none = tokens[::3]
    assert not torch.allclose(full, half, atol=1e-3) and not torch.allclose(half, none, atol=1e-3)
    plain = own.encode_prompt("a cat", "cpu")[0]
    assert torch.allclose(plain, full[1:])  # and the scale is back afterwards
    own.unload_lora_weights()
    assert torch.allclose(own.encode_prompt("a cat", "cpu")[0], none[1:], atol=1e-5)
    for scale in ("much", float("nan"), True):
        with pytest.raises(UserError, match=r"cross_attention_kwargs\['scale'\] is .*must be a finite number"):
            draw(own, cross_attention_kwargs={"scale": scale})


def test_two_adapters_and_their_weights(own, adapters):
    plain = draw(own)
    own.load_lora_weights(adapters, adapter_name="one")
    one = draw(own)
    own.load_lora_weights(adapters, adapter_name="two")
    own.set_adapters(["one", "two"], [0.25, 0.75])
    assert np.abs(draw(own) - one).max() <= 1e-4
    own.fuse_lora(adapter_names=["one", "two"])
    assert np.abs(draw(own) - one).max() <= 1e-4
    own.unfuse_lora()
    own.disable_lora()
    assert np.abs(draw(own) - plain).max() <= 1e-4


def test_kohyas_format(own, model, adapters, tmp_path):
    """As many tools write it: other names, α beside the matrices, and metadata that do not say what they are."""
    tensors = {}
    for name, value in load_file(adapters / ldm_hub.ADAPTERS).items():
        layer, _, matrix = name.replace(".lora_linear_layer.", ".lora.").partition(".lora.")
        prefix, _, layer = layer.partition(".")
        known = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[prefix] + layer.replace(".", "_")
        tensors |= {f"{known}.lora_{matrix}": value, f"{known}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "kohya.safetensors", metadata={"ss_network_dim": "3"})
    own.load_lora_weights(adapters)
    expected = draw(own)
    other = LatentDiffusionPipeline.from_pretrained(model)
    other.set_progress_bar_config(disable=True)
    other.load_lora_weights(tmp_path / "kohya.safetensors")
    assert np.abs(draw(other) - expected).max() <= 1e-5


def faults():
    def replaced(name, value):
        return lambda tensors: tensors.update({name: value})

    return {
        "NaN": (replaced(UP, torch.full((16, 3), torch.nan)), f"'{UP}' is not finite"),
        "width": (replaced(DOWN, torch.zeros(3, 17)), "to_k.lora_A.weight expects (3, 16), the file has (3, 17)"),
        "rank": (replaced(UP, torch.zeros(16, 2)), "to_k.lora_B.weight expects (16, 3), the file has (16, 2)"),
        "one matrix": (lambda tensors: tensors.pop(UP), "to_k.lora_B.weight expects (16, 3), the file has nothing"),
        "no such layer": (
            replaced(UP.replace("mid_block", "middle"), torch.zeros(16, 3)),
            "to_k.lora_B.weight expects nothing, the file has (16, 3)",
        ),
        "no layer": (replaced("unet.mid_block.lora_B.weight", torch.zeros(16, 3)), "expects nothing"),
        "text": (replaced(TEXT_UP, torch.zeros(5, 3)), "q_proj.lora_B.weight expects (16, 3), the file has (5, 3)"),
        "prior": (replaced("prior.proj_in.lora_A.weight", torch.zeros(3, 16)), "is no adapter of unet or text_encoder"),
        "vae": (replaced("vae.encoder.conv_in.weight", torch.zeros(8, 3)), "is no adapter of unet or text_encoder"),
        "empty": (lambda tensors: tensors.clear(), "hold no weights"),
    }


@pytest.mark.parametrize("fault", faults())
def test_files_that_do_not_fit(own, changed, fault):
    change, words = faults()[fault]
    with pytest.raises(UserError) as refused:
        own.load_lora_weights(changed(change))
    assert (
        words in str(refused.value) and "\n" not in str(refused.value) and "changed.safetensors" in str(refused.value)
    )
    assert own.get_list_adapters() == {}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"unet.r": 3, "unet.lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"unet.alpha_pattern": {"to_k": "all"}}, "alpha_pattern must be a finite number"),
        ({"unet.init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
        ([1, 2], "lora_adapter_metadata cannot be read"),
    ],
)
def test_metadata_that_cannot_be(own, changed, metadata, words):
    with pytest.raises(UserError, match=r"changed\.safetensors: ") as refused:
        own.load_lora_weights(changed(lambda tensors: None, {"lora_adapter_metadata": json.dumps(metadata)}))
    assert words in str(refused.value)


def test_files_that_are_not_there_or_not_whole(own, adapters, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "several").mkdir()
    content = (adapters / ldm_hub.ADAPTERS).read_bytes()
    for name in ("a", "b"):
        (tmp_path / "several" / f"{name}.safetensors").write_bytes(content)
    (tmp_path / "cut.safetensors").write_bytes(content[:-100])
    (tmp_path / "page.safetensors").write_bytes(b"<html>not found</html>")
    for name, words in {
        "empty": f"adapters missing: expected {tmp_path / 'empty' / ldm_hub.ADAPTERS}",
        "pickled": "only a pickle (pytorch_lora_weights.bin) is there; convert it to safetensors",
        "pickled/pytorch_lora_weights.bin": "only safetensors are opened, no pickles",
        "several": "are several: a.safetensors, b.safetensors; name one with weight_name",
        "cut.safetensors": f"cut.safetensors is damaged: its header promises {len(content)} bytes, the file has",
        "page.safetensors": "page.safetensors is damaged",
        "absent": f"do not exist; give a file, a folder that holds {ldm_hub.ADAPTERS}, or owner/repository",
    }.items():
        with pytest.raises(UserError) as refused:
            own.load_lora_weights(tmp_path / name)
        assert words in str(refused.value), name
    with pytest.raises(UserError, match="use_safetensors must be True"):
        own.load_lora_weights(adapters, use_safetensors=False)
    with pytest.raises(UserError, match="revision 'main' belongs to a repository"):
        own.load_lora_weights(adapters, revision="main")
    assert own.get_list_adapters() == {}
    own.load_lora_weights(tmp_path / "several", weight_name="b.safetensors")


def test_from_a_repository(hub, model, adapters, tmp_path):
    repository = shutil.copytree(adapters, tmp_path / "repository")
    shutil.copytree(model / "unet", repository / "unet")  # no part of the adapters
    hub.repositories["user/adapters"] = {"b" * 40: repository}
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):  # and again from the cache
        result = hub.run(RESOLVE, "main", **environment)
        assert result.returncode == 0, result.stderr
        path = Path(result.stdout.strip())
        assert path.read_bytes() == (adapters / ldm_hub.ADAPTERS).read_bytes() and not (path.parent / "unet").exists()
        assert result.stderr == f"note: 'user/adapters' is of commit {'b' * 40}\n"
    result = hub.run(RESOLVE, "other")
    assert result.stderr.startswith("error: adapters 'user/adapters' has no revision 'other'")
    assert result.stderr.count("\n") == 1


def test_a_pipeline_with_them_is_saved_only_as_one_model(own, adapters, tmp_path):
    own.load_lora_weights(adapters)
    with pytest.raises(UserError, match="adapters default_0 are loaded"):
        own.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    own.fuse_lora()
    fused = draw(own, num_prior_samples=1, prior_num_inference_steps=3)
    own.unload_lora_weights()
    own.save_pretrained(tmp_path / "model")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert np.abs(draw(stock, prior_num_inference_steps=3) - fused).max() <= 1 / 255


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return caught.value.code


def test_the_command_draws_with_them(model, adapters, tmp_path, capsys):
    pictures = {}
    for name, options in {
        "plain": [],
        "all": ["--lora", adapters],
        "none": ["--lora", adapters, "--lora-scale", "0"],
        "half": ["--lora", adapters, "--lora-scale", "0.5"],
    }.items():
        output = tmp_path / f"{name}.png"
        assert run("generate", "a cat", "--model", model, "--output", output, "--num-inference-steps", 3, *options) == 0
        pictures[name] = np.asarray(Image.open(output)).astype(int)
    assert np.abs(pictures["none"] - pictures["plain"]).max() <= 1
    assert np.abs(pictures["all"] - pictures["plain"]).max() > 1
    assert np.abs(pictures["all"] - pictures["half"]).max() > 1
    capsys.readouterr()
    for options, words in (
        (["--lora-scale", "1"], "--lora-scale belongs to adapters"),
        (["--lora", adapters, "--lora-scale", "nan"], "--lora-scale is nan; it must be a finite number"),
        (["--lora", tmp_path / "absent"], "absent' do not exist"),
    ):
        assert run("generate", "a cat", "--model", model, "--output", tmp_path / "no.png", *options) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert not (tmp_path / "no.png").exists()
