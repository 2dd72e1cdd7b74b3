"""Adapters of low rank for a model that there is: what trains them, on images and captions as they are, and the file
that stock Diffusers' `load_lora_weights` reads (Hu et al. 2021, arXiv:2106.09685)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from ldm import files, hub
from ldm.clip.tokenizer import encode
from ldm.components.configs import read_json
from ldm.config import LdmConfig
from ldm.data.batches import open_data
from ldm.data.captions import open_images
from ldm.data.order import Share
from ldm.diffusion.embedding_noise import noised_embedding
from ldm.diffusion.objective import dropped, timesteps
from ldm.errors import UserError, nearest
from ldm.lora_config import LoraConfig
from ldm.training import precision, randomness
from ldm.training.checkpoint import Saved
from ldm.training.task import Task

BASE = "base_sha256"
"""Of a checkpoint's state: which model its adapters belong to."""
PROCESS = {"prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "linear"}
"""Of a scheduler's configuration, what Diffusers takes where it does not say."""


def with_process_of_base(config: LdmConfig) -> tuple[LdmConfig, Path]:
    """The configuration with what the U-Net in `init` predicts, and over how many timesteps; and the folder that it is
    opened from.

    Raises:
        UserError: there is no such folder or repository, or it predicts something else than what is configured.
    """
    try:
        folder = hub.resolve(config.init)
        read_json(folder / hub.INDEX)  # else it is no pipeline's
        stored = PROCESS | read_json(folder / "scheduler" / "scheduler_config.json")
    except UserError as error:
        raise UserError(f"init {config.init}: {error}") from None
    for name in PROCESS:
        given, default = getattr(config, name), LdmConfig.__dataclass_fields__[name].default
        if given not in (default, stored[name]):
            raise UserError(f"{name} {given}: the model in init {config.init} has {stored[name]}; leave it out")
    told = {name: stored[name] for name in ("prediction_type", "num_train_timesteps")}
    return dataclasses.replace(config, **told), folder


def state_of_base(config: LdmConfig, folder: Path, resumed: Saved | None) -> dict[str, str]:
    """What a checkpoint keeps of the model in `init`, opened from `folder`, to whose weights alone adapters belong.

    Raises:
        UserError: `resumed` was begun on another.
    """
    now = hub.sha256_of_model(folder)
    begun = now if resumed is None else resumed.state.get(BASE, now)
    if now != begun:
        raise UserError(
            f"--resume: the model in init {config.init} has changed since the run began (sha256 {begun}, now {now}); "
            "put it back, or begin a new run"
        )
    return {BASE: now}


class AdaptedUNet(nn.Module):
    """A U-Net with adapters, and a text encoder where that has some, so that one call reaches all that is trained."""

    _supports_gradient_checkpointing = True

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module | None):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, z_t: Tensor, t: Tensor, input_ids: Tensor | None = None, **conditions: Any):
        """As the U-Net; `input_ids` (B, L), which the text encoder reads, in place of encoder_hidden_states."""
        if input_ids is not None:
            conditions["encoder_hidden_states"] = self.text_encoder(input_ids)[0]
        return self.unet(z_t, t, **conditions)

    def enable_gradient_checkpointing(self) -> None:
        self.unet.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            newer = getattr(self.text_encoder, "activation_checkpointing_enable", None)
            (newer or self.text_encoder.gradient_checkpointing_enable)({"use_reentrant": False})


def add_adapters(model: nn.Module, config: LoraConfig, option: str) -> None:
    """Freezes a network of Diffusers or Transformers and adds adapters, B = 0, to the layers that `option` names.

    Raises:
        UserError: no layer's name ends as one of them.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    ends = {".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]) for parts in (n.split(".") for n in layers)}
    for wanted in getattr(config, option):
        if not any(f".{name}".endswith(f".{wanted}") for name in layers):
            raise UserError(
                f"lora.{option} {wanted!r}: no layer of {type(model).__name__} is called so"
                f"{nearest(wanted, sorted(ends))}"
            )
    model.requires_grad_(False)
    model.add_adapter(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            init_lora_weights="gaussian",
            target_modules=getattr(config, option),
        )
    )


def save_adapters(network: AdaptedUNet, config: LoraConfig, folder: Path) -> None:
    """Writes hub.ADAPTERS, with the rank and α by which pipelines scale what they add."""
    parts = {}
    for name, option in (("unet", "target_modules"), ("text_encoder", "text_target_modules")):
        model = getattr(network, name)
        if model is None:
            continue
        layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model))
        if name == "text_encoder" and not hasattr(model, "text_model"):  # as every release of Transformers reads it
            layers = {f"text_model.{key}": value for key, value in layers.items()}
        parts[f"{name}_lora_layers"] = {key: value.detach().cpu().contiguous() for key, value in layers.items()}
        # No more of PEFT's own configuration, whose other keys change from release to release
        parts[f"{name}_lora_adapter_metadata"] = {
            "r": config.rank,
            "lora_alpha": config.rank if config.alpha is None else config.alpha,
            "target_modules": sorted(getattr(config, option)),
        }
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, **parts)
    files.make_readable(folder / hub.ADAPTERS)


def on_pipeline(
    config: LdmConfig, share: Share, pipe: DiffusionPipeline, embed_images: Callable[[Tensor], Tensor] | None
) -> Task:
    """Adapters for the U-Net, and maybe the text encoder, of a text-to-image pipeline, which gets them at once.

    embed_images: images (B, 3, S, S) in [-1, 1] -> CLIP image embeddings (B, D), for U-Nets that they guide.

    Raises:
        UserError: the pipeline's U-Net cannot be trained so, or adapters cannot be added as configured.
    """
    unet, vae, text_encoder, tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    check_trainable(config, pipe, embed_images is not None)
    settings, is_guided = config.lora, unet.config.class_embed_type is not None
    data = open_data(config.data, config.seed, share.num_processes)
    validation = None
    if config.validation_split is not None:
        split = dataclasses.replace(config.data, split=config.validation_split, streaming=False)
        validation = open_images(split, config.seed)
    for part in (vae, text_encoder):
        part.requires_grad_(False)
    torch.manual_seed(randomness.key(config.seed, "adapters"))
    add_adapters(unet, settings, "target_modules")
    if settings.text_encoder:
        add_adapters(text_encoder, settings, "text_target_modules")
    if is_guided:
        normalizer = pipe.image_normalizer
        embedding_dim = normalizer.config.embedding_dim
        embedding_alpha_bar = pipe.image_noising_scheduler.alphas_cumprod.to(pipe.device, precision.finest(pipe.device))

    @torch.no_grad()
    def encoded(batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of images with their scaled latents."""
        images = batch["images"].to(vae.device, memory_format=torch.channels_last)
        posterior, factor = vae.encode(images).latent_dist, vae.config.scaling_factor
        return {**batch, "latent_mean": posterior.mean * factor, "latent_std": posterior.std * factor}

    @torch.no_grad()
    def embeddings(batch: dict[str, Any], draw: torch.Generator, share: Share, part: slice) -> Tensor:
        """CLIP embeddings (B, D) of the images, or the prior's samples for their captions."""
        if settings.image_embeddings == "image":
            return embed_images(batch["images"])
        seeds = torch.randint(2**62, (share.batch_size,), generator=draw)[part].tolist()
        return pipe.sample_image_embeds(
            batch["captions"],
            num_inference_steps=pipe.default_settings["prior_num_inference_steps"],
            guidance_scale=pipe.default_settings["prior_guidance_scale"],
            num_samples=1,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )

    def conditions(batch: dict[str, Any], draw: torch.Generator, share: Share, part: slice) -> dict[str, Tensor]:
        """Captions, as tokens or what the text encoder says of them, and noised image embeddings; a dropped caption is
        the empty one, a dropped embedding all zeros, as stock pipelines have them."""
        draws = torch.rand(2, share.batch_size, generator=draw)
        shares = config.caption_dropout, config.image_embedding_dropout, config.joint_dropout
        no_caption, no_image = (mask[part] for mask in dropped(draws[1], *shares))
        captions = ["" if gone else text for text, gone in zip(batch["captions"], no_caption, strict=True)]
        told = {"input_ids": encode(tokenizer, captions)[0].to(pipe.device)}
        if not settings.text_encoder:
            with torch.no_grad():
                told = {"encoder_hidden_states": text_encoder(told["input_ids"])[0]}
        if not is_guided:
            return told
        embedding_noise = torch.randn(share.batch_size, embedding_dim, generator=draw)
        level = timesteps(draws[0], config.max_noise_level + 1, "uniform")
        noise, level, no_image = (values.to(pipe.device) for values in (embedding_noise[part], level[part], no_image))
        mean, std = normalizer.mean[0].detach(), normalizer.std[0].detach()
        embeds = embeddings(batch, draw, share, part)
        condition = noised_embedding(embeds, mean, std, level, embedding_alpha_bar, noise)
        return told | {"class_labels": condition.masked_fill(no_image[:, None], 0.0)}

    def drawn(_network: nn.Module) -> Tensor | None:
        """By the pipeline, whose parts the network is made of."""
        if not config.sample_prompts:
            return None
        numbers = range(len(config.sample_prompts))
        images = pipe(
            config.sample_prompts,
            guidance_scale=config.sample_guidance_scale,
            generator=[randomness.generator(config.seed, "samples", number) for number in numbers],
            output_type="pt",
        ).images
        return images * 2 - 1

    return Task(
        data=data,
        unet=AdaptedUNet(unet, text_encoder if settings.text_encoder else None),
        alpha_bar=pipe.scheduler.alphas_cumprod.double(),
        conditions=conditions,
        samples=drawn,
        save=lambda network, folder: save_adapters(network, settings, folder),
        validation=validation,
        encoded=encoded,
    )


def check_trainable(config: LdmConfig, pipe: DiffusionPipeline, reads_images: bool) -> None:
    """Raises UserError unless the pipeline's U-Net draws from what this run can tell it, at the size of the images."""
    unet, latents = pipe.unet.config, pipe.vae.config.latent_channels
    if {unet.in_channels, unet.out_channels} != {latents}:
        raise UserError(
            f"init {config.init}: its U-Net reads {unet.in_channels} channels and gives {unet.out_channels}, but "
            f"latents have {latents}; take a model that draws from text alone"
        )
    if unet.addition_embed_type not in (None, "text") or unet.class_embed_type not in (None, "projection"):
        raise UserError(f"init {config.init}: its U-Net is told more than captions and image embeddings; take another")
    if unet.class_embed_type is not None:
        from_images = config.lora.image_embeddings == "image"
        if pipe.image_normalizer is None or (not from_images and pipe.prior is None):
            raise UserError(f"init {config.init}: image embeddings guide its U-Net, and it has no prior to make them")
        if from_images and not reads_images:
            raise UserError(
                f"init {config.init}: image embeddings guide its U-Net, and it has no image_encoder to make them; name "
                "the run or folder that has one with clip=…, or set lora.image_embeddings=prior"
            )
    step = pipe.vae_scale_factor * 2 ** (len(unet.block_out_channels) - 1)
    if config.data.image_size % step:
        least = max(step, config.data.image_size // step * step)
        raise UserError(
            f"data.image_size {config.data.image_size}: the networks of init {config.init} halve images to a {step}th; "
            f"take {least} or another multiple of {step}"
        )
