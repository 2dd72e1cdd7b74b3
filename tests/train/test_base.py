"""The configurations at Stable Diffusion's scale, built without memory."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PriorTransformer
from transformers import CLIPTextModel

from ldm import configuration
from ldm.clip import export
from ldm.clip.model import build
from ldm.clip.tokenizer import clip_tokenizer
from ldm.config import AutoencoderConfig, CacheConfig, ClipConfig, LdmConfig, PriorConfig
from ldm.training.unet import build_unet

BASE = Path(__file__).parents[2] / "configs" / "base"


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_autoencoder_is_stable_diffusions():
    config = configuration.load(AutoencoderConfig, BASE / "autoencoder.yaml")
    with torch.device("meta"):
        vae = AutoencoderKL(**config.model)
    assert parameters(vae) == 83_653_863
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8


def test_text_tower_is_stable_diffusion_2s():
    config = configuration.load(ClipConfig, BASE / "clip.yaml")
    tokenizer = clip_tokenizer(config.context_length)
    with torch.device("meta"):
        clip = build(
            **config.model,
            image_size=config.data.image_size,
            vocabulary_size=len(tokenizer),
            context_length=config.context_length,
        )
        text_config = export.text_config(clip, tokenizer)
        text_encoder = CLIPTextModel(text_config)
    assert parameters(text_encoder) == 340_387_840
    assert text_config.projection_dim == text_config.hidden_size == 1024


def test_unet_is_that_of_stable_diffusion_2_1_unclip():
    config = configuration.load(LdmConfig, BASE / "ldm.yaml")
    with torch.device("meta"):
        unet = build_unet(config, (4, 32, 32), text_width=1024, embedding_dim=1024)
    class_embedding = 2048 * 1280 + 1280 + 1280 * 1280 + 1280  # beside the 865,910,724 of Stable Diffusion 2.1
    assert parameters(unet.class_embedding) == class_embedding
    assert parameters(unet) == 865_910_724 + class_embedding == 870_173_124


def test_without_image_embeddings_it_is_stable_diffusion_2_1s():
    text_only = ["image_conditioning=false", "prior=null", "max_noise_level=0"]
    config = configuration.load(LdmConfig, BASE / "ldm.yaml", text_only)
    with torch.device("meta"):
        assert parameters(build_unet(config, (4, 32, 32), text_width=1024, embedding_dim=512)) == 865_910_724


def test_prior_has_a_billion_parameters_as_dall_e_2s():
    config = configuration.load(PriorConfig, BASE / "prior.yaml")
    with torch.device("meta"):
        prior = PriorTransformer(**config.model, embedding_dim=1024, num_embeddings=77)
    assert parameters(prior) == pytest.approx(1e9, rel=0.05)


def test_caching_reads_the_same_images():
    cache = configuration.load(CacheConfig, BASE / "cache.yaml")
    clip = configuration.load(ClipConfig, BASE / "clip.yaml")
    assert cache.data == clip.data
