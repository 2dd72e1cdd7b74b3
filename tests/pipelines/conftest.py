"""Tiny random components of every stage, laid out as the training runs leave them, and the pipeline of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    PriorTransformer,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

LENGTH, DIMENSION = 12, 16  # tokens; D, which PriorTransformer wants to be the text tower's width too


def tokenizer() -> CLIPTokenizer:
    """Letters, the end of a word marked, and a few words; the end of text has the highest id."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def text_config(reader: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(reader),
        hidden_size=DIMENSION,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=DIMENSION,
        bos_token_id=reader.bos_token_id,
        eos_token_id=reader.eos_token_id,
        pad_token_id=reader.eos_token_id,
    )


def components() -> dict:
    """What the four stages leave, by name of folder; random, and the same on each call."""
    torch.manual_seed(0)
    reader = tokenizer()
    text_encoder = CLIPTextModelWithProjection(text_config(reader))
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=DIMENSION,
        )
    )
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=DIMENSION,
        num_embeddings=LENGTH,
    )
    prior.clip_mean.data.normal_()
    prior.clip_std.data.uniform_(0.5, 2.0)
    prior.positional_embedding.data.normal_()
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=DIMENSION)
    normalizer.mean.data.normal_()
    normalizer.std.data.uniform_(0.5, 2.0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=DIMENSION,
        attention_head_dim=4,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * DIMENSION,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.7,
    )
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "image_encoder": image_encoder.eval(),
        "tokenizer": reader,
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        "prior": prior.eval(),
        "prior_scheduler": DDPMScheduler(
            prediction_type="sample", beta_schedule="squaredcos_cap_v2", num_train_timesteps=100, clip_sample_range=5.0
        ),
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        "image_normalizer": normalizer.eval(),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


STAGES = {
    "autoencoder": ["vae"],
    "clip": ["text_encoder", "image_encoder", "tokenizer", "image_processor"],
    "prior": ["prior", "prior_scheduler"],
    "unet": ["unet", "scheduler", "image_normalizer", "image_noising_scheduler"],
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run folders of the four stages. Copy one before changing it."""
    root = tmp_path_factory.mktemp("runs")
    parts = components()
    for stage, names in STAGES.items():
        for name in names:
            parts[name].save_pretrained(root / stage / "model" / name)
    return {stage: root / stage for stage in STAGES}


@pytest.fixture(scope="session")
def pipe():
    """The pipeline with a prior."""
    from pipelines import LatentDiffusionPipeline

    parts = components()
    with_projection = parts["text_encoder"]
    text_encoder = CLIPTextModel(with_projection.config).eval()
    state = {key: value for key, value in with_projection.state_dict().items() if key != "text_projection.weight"}
    text_encoder.load_state_dict(
        {key if key in text_encoder.state_dict() else key.removeprefix("text_model."): state[key] for key in state}
    )
    pipe = LatentDiffusionPipeline(
        prior_tokenizer=parts["tokenizer"],
        prior_text_encoder=with_projection,
        tokenizer=parts["tokenizer"],
        text_encoder=text_encoder,
        vae=parts["vae"],
        unet=parts["unet"],
        scheduler=parts["scheduler"],
        prior=parts["prior"],
        prior_scheduler=parts["prior_scheduler"],
        image_normalizer=parts["image_normalizer"],
        image_noising_scheduler=parts["image_noising_scheduler"],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipe_without_prior():
    """The pipeline of the StableDiffusionPipeline layout."""
    from pipelines import LatentDiffusionPipeline

    parts = components()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        **{
            key: value
            for key, value in parts["unet"].config.items()
            if not key.startswith("_") and key not in ("class_embed_type", "projection_class_embeddings_input_dim")
        }
    )
    pipe = LatentDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=CLIPTextModel(parts["text_encoder"].config).eval(),
        tokenizer=parts["tokenizer"],
        unet=unet.eval(),
        # stock StableDiffusionPipeline sets this offset itself when it finds another one
        scheduler=DDIMScheduler.from_config(parts["scheduler"].config, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def family(pipe) -> dict:
    """Every pipeline of the package by its class's name, all of one model's components."""
    import pipelines

    parts = components()
    tower = {"image_encoder": parts["image_encoder"], "feature_extractor": parts["image_processor"]}
    result = {}
    for name in pipelines.__all__:
        kind = getattr(pipelines, name)
        result[name] = kind.from_pipe(pipe, **tower if "feature_extractor" in kind._optional_components else {})
        result[name].set_progress_bar_config(disable=True)
    return result


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two images of 16 × 16 pixels: smooth, so that a resampling leaves them alike, and unlike one another."""
    down, right = np.meshgrid(np.linspace(0, 255, 16), np.linspace(0, 255, 16), indexing="ij")
    return [
        Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
        for channels in ((down, right, 255 - down), (255 - right, down // 2, right))
    ]


@pytest.fixture(scope="session")
def mask() -> Image.Image:
    """White where it is to be painted: the right half, 16 × 16 pixels."""
    return Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 16, axis=0).astype(np.uint8))
