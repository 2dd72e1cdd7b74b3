"""Folders as others have published them: their configurations scaled down, written by stock Diffusers, made as old as
the published ones are, opened by ours, and drawn as stock draws them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    KandinskyPriorPipeline,
    KandinskyV22PriorPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ldm.errors import UserError
from pipelines import LatentDiffusionPipeline, LatentDiffusionPriorPipeline, LatentDiffusionVariationPipeline

LENGTH = 12
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CASES = {
    "one": {"prompt": "a cat!"},
    "batch": {"prompt": ["a cat", "two dogs of a very great length"], "num_images_per_prompt": 2},
    "negative": {"prompt": "a cat", "negative_prompt": "a dog"},
    "unguided": {"prompt": "a cat", "guidance_scale": 1.0},
}


def tokenizer(folder: Path, pad: str | None = None) -> CLIPTokenizer:
    """With `!` as its first token, which Stable Diffusion 2.x pads with."""
    letters = ["!", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("c", "a"), ("ca", "t</w>")],
        model_max_length=LENGTH,
        **{"pad_token": pad} if pad else {},
    )


def text_config(activation: str, layers: int = 3, width: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=58, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=width, hidden_act=activation, bos_token_id=56, eos_token_id=57,
        pad_token_id=57,
    )  # fmt: skip


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip


def unet(**further) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **further,
    )  # fmt: skip


def version_1(folder: Path) -> None:
    """Stable Diffusion 1.5: PNDM, ε, QuickGELU, a safety checker; saved by Diffusers 0.6 and Transformers 4.22."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config("quick_gelu")),
        tokenizer=tokenizer(folder),
        unet=unet(attention_head_dim=8),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=StableDiffusionSafetyChecker(
            CLIPConfig(
                vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 16,
                               "num_attention_heads": 2, "patch_size": 8},
                projection_dim=8,
            )
        ),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}),
    )  # fmt: skip
    pipe.save_pretrained(folder)


def version_2(folder: Path) -> None:
    """Stable Diffusion 2.1: DDIM, v, the tower's penultimate layer as its last, `!` for padding, linear projections."""
    torch.manual_seed(1)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config("gelu", layers=2)),
        tokenizer=tokenizer(folder, pad="!"),
        unet=unet(attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def unclip(folder: Path) -> None:
    """Stable Diffusion 2.1-unCLIP: the layout of image variations, without a prior."""
    torch.manual_seed(2)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=24)
    normalizer.mean.data.normal_()
    normalizer.std.data.uniform_(0.5, 2.0)
    pipe = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                             image_size=16, patch_size=8, projection_dim=24)
        ),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer(folder, pad="!"),
        text_encoder=CLIPTextModel(text_config("gelu", layers=2)),
        unet=unet(attention_head_dim=[2, 4], use_linear_projection=True, class_embed_type="projection",
                  projection_class_embeddings_input_dim=48),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"),
        vae=autoencoder(),
    )  # fmt: skip
    pipe.save_pretrained(folder)


def karlo(folder: Path) -> dict:
    """Karlo's prior and its text tower, whose scheduler others exchange for DDPM's of the same configuration."""
    torch.manual_seed(3)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=24, num_embeddings=LENGTH,
        additional_embeddings=4,
    )  # fmt: skip
    prior.clip_mean.data.normal_()
    prior.clip_std.data.uniform_(0.5, 2.0)
    prior.positional_embedding.data.normal_()
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample_range=5.0, prediction_type="sample"
    )
    return {
        "prior": prior.eval(),
        "prior_tokenizer": tokenizer(folder),
        "prior_text_encoder": CLIPTextModelWithProjection(text_config("quick_gelu", width=24)).eval(),
        "prior_scheduler": DDPMScheduler.from_config(scheduler.config),
    }


def age(folder: Path) -> None:
    """What folders of 2022 and 2023 hold, and today's Diffusers does not write."""
    for file in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        config = json.loads(file.read_text())
        if "_diffusers_version" in config:
            config["_diffusers_version"] = "0.6.0"
        if file.parent.name == "vae":  # written from 0.12 and later on
            for key in set(config) & {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast",
                                      "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"}:  # fmt: skip
                del config[key]
        if file.parent.name == "unet":
            kept = {"_class_name", "_diffusers_version", "act_fn", "attention_head_dim", "block_out_channels",
                    "center_input_sample", "cross_attention_dim", "down_block_types", "downsample_padding",
                    "flip_sin_to_cos", "freq_shift", "in_channels", "layers_per_block", "mid_block_scale_factor",
                    "norm_eps", "norm_num_groups", "out_channels", "sample_size", "up_block_types"}  # fmt: skip
            config = {key: value for key, value in config.items() if key in kept}
        if file.parent.name == "scheduler":
            kept = {"_class_name", "_diffusers_version", "beta_end", "beta_schedule", "beta_start", "clip_sample",
                    "num_train_timesteps", "set_alpha_to_one", "skip_prk_steps", "steps_offset"}  # fmt: skip
            config = {key: value for key, value in config.items() if key in kept} | {"trained_betas": None}
            config["clip_sample"] = False  # of PNDM, which has no such setting
        if file.parent.name == "text_encoder":
            config["torch_dtype"] = config.pop("dtype")
            config |= {"_name_or_path": "openai/clip-vit-large-patch14", "transformers_version": "4.22.0.dev0"}
        if file.name == "model_index.json":
            config["feature_extractor"][1] = "CLIPFeatureExtractor"
        file.write_text(json.dumps(config))

    def rename(path: Path, change) -> None:
        tensors = load_file(path)
        save_file(change(tensors), path, metadata={"format": "pt"})

    def attention(tensors: dict) -> dict:
        names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for new, old in names.items():
            tensors = {key.replace(new, old): value for key, value in tensors.items()}
        return tensors

    def positions(tensors: dict) -> dict:
        tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
        return tensors | {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}

    rename(folder / "vae/diffusion_pytorch_model.safetensors", attention)
    rename(folder / "text_encoder/model.safetensors", positions)
    fast = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(fast["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in fast["merges"]]
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start = end | {"content": "<|startoftext|>"}
    (folder / "tokenizer/special_tokens_map.json").write_text(
        json.dumps({"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end})
    )
    written = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": LENGTH}
    written |= {"pad_token": "<|endoftext|>", "name_or_path": "openai/clip-vit-large-patch14"}
    written |= {"tokenizer_class": "CLIPTokenizer"}
    special = {key: value | {"__type": "AddedToken"} for key, value in (("bos_token", start), ("eos_token", end))}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(written | special | {"errors": "replace"}))
    # What ours must pass by
    for path in list(folder.glob("*/*.safetensors")):
        path.with_suffix(".bin").write_bytes(b"a pickle")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".non_ema.safetensors"))
    (folder / "v1-5-pruned.safetensors").write_bytes(b"all of it")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, case: dict, **settings) -> np.ndarray:
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"} | settings | case
    return pipe(**settings, generator=torch.Generator().manual_seed(5)).images


def same(ours, theirs, case: dict, **settings) -> bool:
    once, twice = drawn(ours, case, **settings.pop("own", {}), **settings), drawn(theirs, case, **settings)
    assert twice.std() > 0.01
    return np.abs(once - twice).max() <= 1 / 255


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "stable-diffusion-v1-5"
    version_1(folder)
    age(folder)
    return folder


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "stable-diffusion-2-1"
    version_2(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_stable_diffusion_1(first, name):
    ours = quiet(LatentDiffusionPipeline.from_pretrained(first))
    theirs = quiet(DiffusionPipeline.from_pretrained(first, safety_checker=None, use_safetensors=True))
    assert type(ours.scheduler) is PNDMScheduler and ours.vae.config.scaling_factor == 0.18215
    assert ours.unet.config.sample_size == theirs.unet.config.sample_size == 64  # stock's, for what is so old
    assert same(ours, theirs, CASES[name], height=16, width=16)


def test_what_is_not_needed_is_said(first, capsys):
    LatentDiffusionPipeline.from_pretrained(first)
    assert (
        f"note: feature_extractor, safety_checker of '{first}' not needed, and passed over\n" in capsys.readouterr().err
    )


def test_settings_that_stock_sets_right(second, tmp_path):
    folder = shutil.copytree(second, tmp_path / "model")
    path = folder / "scheduler/scheduler_config.json"
    wrong = {"steps_offset": 0, "clip_sample": True, "_diffusers_version": "0.8.0"}
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    ours, theirs = (quiet(kind.from_pretrained(folder)) for kind in (LatentDiffusionPipeline, DiffusionPipeline))
    assert same(ours, theirs, CASES["negative"])


@pytest.mark.parametrize("name", CASES)
def test_stable_diffusion_2(second, name):
    ours, theirs = (quiet(kind.from_pretrained(second)) for kind in (LatentDiffusionPipeline, DiffusionPipeline))
    assert ours.scheduler.config.prediction_type == "v_prediction" and ours.tokenizer.pad_token == "!"
    assert same(ours, theirs, CASES[name])


def test_layers_of_the_text_tower_left_out(second):
    """That stock asks for an attribute which Transformers 5 has removed is not ours to repeat: compared with what it is
    meant to be, a tower of fewer layers."""
    ours = quiet(LatentDiffusionPipeline.from_pretrained(second))
    theirs = quiet(DiffusionPipeline.from_pretrained(second))
    whole = theirs.text_encoder
    shorter = CLIPTextModel(text_config("gelu", layers=1)).eval()
    shorter.load_state_dict({key: whole.state_dict()[key] for key in shorter.state_dict()})
    case = CASES["unguided"]
    before = drawn(ours, case)
    assert np.array_equal(drawn(ours, case | {"clip_skip": 0}), before)
    theirs.text_encoder = shorter
    assert np.abs(drawn(ours, case | {"clip_skip": 1}) - drawn(theirs, case)).max() <= 1 / 255
    assert np.abs(drawn(theirs, case) - before).max() > 1e-4
    with pytest.raises(UserError, match="clip_skip is 3; it must be a whole number from 0 to 2"):
        drawn(ours, {"prompt": "a cat", "clip_skip": 3})


@pytest.mark.parametrize("shards", [False, True])
def test_a_variant_whole_and_in_shards(second, tmp_path, shards):
    """`*.fp16.safetensors` beside the plain files; in shards with an index, by today's names and by older ones."""
    theirs = DiffusionPipeline.from_pretrained(second, dtype=torch.float16)
    folder = shutil.copytree(second, tmp_path / "model")
    theirs.save_pretrained(folder, variant="fp16", **{"max_shard_size": "12KB"} if shards else {})
    pieces = [path.name for path in (folder / "unet").glob("*fp16*.safetensors")]
    assert any("-of-" in name for name in pieces) == shards
    if shards:
        index = folder / "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
        text = index.read_text()
        for name in pieces:
            older = name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            (folder / "unet" / name).rename(folder / "unet" / older)
            text = text.replace(name, older)
        index.write_text(text)
    for path in folder.glob("*/*.safetensors"):
        if "fp16" not in path.name:
            path.unlink()
    ours = quiet(LatentDiffusionPipeline.from_pretrained(folder, variant="fp16"))
    expected = quiet(DiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float32))
    assert ours.unet.dtype == torch.float32
    assert same(ours, expected, CASES["negative"])


def test_stable_unclip_with_karlos_prior_passed_in(tmp_path):
    unclip(tmp_path / "unclip")
    parts = karlo(tmp_path)
    ours = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "unclip", **parts))
    theirs = quiet(StableUnCLIPPipeline.from_pretrained(tmp_path / "unclip", **parts))
    for name in CASES:
        assert same(
            ours, theirs, CASES[name], own={"num_prior_samples": 1}, prior_num_inference_steps=4, noise_level=20
        )
    ours.save_pretrained(tmp_path / "own")  # with its own prior
    again = quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "own"))
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path / "own"))
    assert type(stock) is StableUnCLIPPipeline
    own = {"num_prior_samples": 1}
    assert same(again, stock, CASES["negative"], own=own, prior_num_inference_steps=4, noise_level=20)
    with pytest.raises(UserError, match="only beside a prior"):
        drawn(quiet(LatentDiffusionPipeline.from_pretrained(tmp_path / "unclip")), CASES["one"], noise_level=0)


def test_stable_unclips_variations(tmp_path, photos):
    unclip(tmp_path)
    ours = quiet(LatentDiffusionVariationPipeline.from_pretrained(tmp_path))
    theirs = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert same(ours, theirs, {"image": photos[0]}, height=16, width=16, noise_level=20)


@pytest.mark.parametrize("kind", [KandinskyPriorPipeline, KandinskyV22PriorPipeline])
def test_kandinskys_prior(tmp_path, kind):
    parts = karlo(tmp_path)
    scheduler = UnCLIPScheduler(
        variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample_range=10.0, prediction_type="sample"
    )
    tower = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                             image_size=16, patch_size=8, projection_dim=24)  # fmt: skip
    theirs = kind(
        prior=parts["prior"],
        image_encoder=CLIPVisionModelWithProjection(tower).eval(),
        text_encoder=parts["prior_text_encoder"],
        tokenizer=parts["prior_tokenizer"],
        scheduler=scheduler,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}),
    )
    quiet(theirs).save_pretrained(tmp_path / "prior")
    ours = quiet(LatentDiffusionPriorPipeline.from_pretrained(tmp_path / "prior"))
    for case in (
        {"prompt": "a cat"},
        {"prompt": ["a cat", "two dogs"], "num_images_per_prompt": 2},
        {"prompt": "a dog", "guidance_scale": 1.0},
        {"prompt": "a dog", "num_inference_steps": 7},
    ):
        settings = {"num_inference_steps": 5} | case
        once = ours(**settings, num_samples=1, generator=torch.Generator().manual_seed(3))
        twice = theirs(**settings, generator=torch.Generator().manual_seed(3))
        assert twice.image_embeds.std() > 0.1 and twice.negative_image_embeds.any()
        assert all((once[name] - twice[name]).abs().max() <= 1e-4 for name in once)
    with pytest.raises(UserError, match=r"is a Kandinsky.*without 'vae'"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "prior")
