"""The U-Net of train_ldm.py in latent space, as the configuration, the data and the other stages ask for it: built, or
opened where training starts from."""

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor

from ldm import configuration
from ldm.config import LdmConfig
from ldm.diffusion import size_condition
from ldm.errors import UserError
from ldm.training import run
from ldm.training.task import warn_of_another_process


def build_unet(
    config: LdmConfig, latent_shape: tuple[int, int, int], text_width: int, embedding_dim: int
) -> UNet2DConditionModel:
    """The U-Net of `config.model`, untrained, for latents (C, h, w), tokens (B, L, text_width) and, with
    `config.image_conditioning`, image embeddings (B, embedding_dim)."""
    follows = what_follows(config, latent_shape, text_width, embedding_dim)
    sizes = {"sample_size": latent_shape[1], **follows}
    return configuration.built("model", UNet2DConditionModel, model_arguments(config, follows), sizes)


def open_unet(
    config: LdmConfig, latent_shape: tuple[int, int, int], text_width: int, embedding_dim: int
) -> UNet2DConditionModel:
    """That of `config.init`, for the same. Raises UserError where it is trained to be told other things."""
    folder = run.component_folder(config.init, "init", "unet")
    warn_of_another_process(config, folder)
    unet = UNet2DConditionModel.from_pretrained(folder)
    for name, is_told in (
        ("image_conditioning", unet.config.class_embed_type is not None),
        ("size_conditioning", unet.config.addition_embed_type == "text_time"),
    ):
        if is_told != getattr(config, name):
            raise UserError(f"init {config.init}: its U-Net was trained with {name}={is_told}; set it alike")
    follows = what_follows(config, latent_shape, text_width, embedding_dim)
    run.check_fits("init", config.init, "U-Net", unet.config, **follows)
    run.check_agrees(config.init, "U-Net", unet.config, model_arguments(config, follows))
    return unet


def image_normalizer(config: LdmConfig, mean: Tensor, std: Tensor) -> StableUnCLIPImageNormalizer:
    """What image embeddings (B, D) are standardised by where noise is added to them: the data's mean and standard
    deviation (D,), but for a U-Net of `config.init`, which goes on with those that it was trained with."""
    if config.init != "scratch":
        folder = run.component_folder(config.init, "init", "image_normalizer")
        return StableUnCLIPImageNormalizer.from_pretrained(folder)
    normalizer = StableUnCLIPImageNormalizer(len(mean))
    normalizer.mean.data.copy_(mean[None])
    normalizer.std.data.copy_(std[None])
    return normalizer


def what_follows(
    config: LdmConfig, latent_shape: tuple[int, int, int], text_width: int, embedding_dim: int
) -> dict[str, Any]:
    """Arguments of UNet2DConditionModel that the data and the other stages leave no choice of."""
    shapes = {"in_channels": latent_shape[0], "out_channels": latent_shape[0], "cross_attention_dim": text_width}
    if config.image_conditioning:
        told = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * embedding_dim}
    else:
        width = size_condition.OWN_WIDTH if config.size_conditioning else None
        told = {"class_embed_type": None, "num_class_embeds": None, "projection_class_embeddings_input_dim": width}
    return shapes | told


def model_arguments(config: LdmConfig, follows: dict[str, Any]) -> dict[str, Any]:
    """`config.model`, and what tells the U-Net sizes where it is told them."""
    if not config.size_conditioning:
        return config.model
    return {**config.model, **size_condition.unet_arguments(follows["projection_class_embeddings_input_dim"])}
