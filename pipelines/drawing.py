"""What the pipelines that draw have in common: their settings, what guides the U-Net, its prediction, the decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.diffusion.guidance import classifier_free_guidance, rescale_guidance, scale_in_interval
from ldm.diffusion.size_condition import size_condition
from ldm.errors import RunError, UserError
from pipelines.adapters import TakesAdapters
from pipelines.base import Generators, LatentDiffusionBase, PriorPrompt, check_generator, given_or
from pipelines.checks import check_pair, check_shape, check_share
from pipelines.settings import DEFAULT_SETTINGS, check_settings

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Callback = Callable[..., dict[str, Tensor]]


@dataclass
class Settings:
    """How a picture is drawn, each value checked; `guidance_scale` is the pipeline's, for callbacks to change."""

    num_inference_steps: int
    noise_level: int
    prior: dict[str, Any]
    """What `sample_image_embeds` takes by these names."""
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    clip_skip: int | None


@dataclass
class Condition:
    """What guides the U-Net. Where there is guidance the unconditional half comes first."""

    prompt_embeds: Tensor
    """(B or 2B, L, D_t)"""
    image_embeds: Tensor | None
    """(B or 2B, 2D), noised, with the embedded noise level"""
    guided: bool
    settings: Settings
    sizes: tuple[int, ...] | None
    """The six numbers of `size_condition`, for U-Nets that are told them."""
    cross_attention_kwargs: dict[str, Any] | None

    @property
    def batch(self) -> int:
        return len(self.prompt_embeds) // 2 if self.guided else len(self.prompt_embeds)


class LatentDiffusionDrawing(TakesAdapters, LatentDiffusionBase):
    """What every pipeline has that draws with the U-Net."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "image_embeds"]  # noqa: RUF012 (read by DiffusionPipeline)
    _guidance_scale = DEFAULT_SETTINGS["guidance_scale"]
    _num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    # ---- settings ----------------------------------------------------------------------------------------------------

    def _settings(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        guidance_rescale: float | None,
        guidance_interval: tuple[float, float] | None,
        eta: float,
        noise_level: int | None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        num_prior_samples: int | None = None,
        prior_prompt_embeds: PriorPrompt | None = None,
        prior_latents: Tensor | None = None,
        clip_skip: int | None = None,
    ) -> Settings:
        """What is given, over `default_settings`. Raises `UserError` for values that cannot be used, and for those that
        nothing in this model reads."""
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "noise_level": noise_level,
            "prior_num_inference_steps": prior_num_inference_steps,
            "prior_guidance_scale": prior_guidance_scale,
            "num_prior_samples": num_prior_samples,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
        }
        given = {name: value for name, value in given.items() if value is not None}
        of_prior = {"prior_prompt_embeds": prior_prompt_embeds, "prior_latents": prior_latents}
        for name in (*given, *(name for name, value in of_prior.items() if value is not None)):
            if lack := self.why_unread(name):
                raise UserError(f"{name}: {lack}; leave it out")
        values = self.default_settings | given
        # The model's own were checked when it took them, but it may have another scheduler since
        check_settings({"num_inference_steps": values["num_inference_steps"], **given}, self._closer_checks())
        self._guidance_scale = float(values["guidance_scale"])
        settings = Settings(
            num_inference_steps=values["num_inference_steps"],
            noise_level=values["noise_level"],
            prior={
                "num_inference_steps": values["prior_num_inference_steps"],
                "guidance_scale": values["prior_guidance_scale"],
                "num_samples": values["num_prior_samples"],
                "prompt_embeds": prior_prompt_embeds,
                "latents": prior_latents,
                "eta": eta,
            },
            guidance_rescale=float(values["guidance_rescale"]),
            guidance_interval=tuple(map(float, values["guidance_interval"])),
            clip_skip=clip_skip,
        )
        check_share("eta", eta)
        self._check_channels()
        if not all(hasattr(self.scheduler, name) for name in ("init_noise_sigma", "scale_model_input", "add_noise")):
            raise UserError(
                f"scheduler is a {type(self.scheduler).__name__}; take one of diffusers' KarrasDiffusionSchedulers, "
                "such as DDIMScheduler"
            )
        if settings.guidance_interval != (0.0, 1.0) and not hasattr(self.scheduler, "alphas_cumprod"):
            raise UserError(
                f"guidance_interval needs to know the share of noise, which {type(self.scheduler).__name__} does not "
                "tell; leave it out, or take another scheduler"
            )
        return settings

    def why_unread(self, name: str) -> str | None:
        """Why nothing in this model reads a setting; None where something does."""
        if "prior" in name and self.prior is None:
            return "this model has no prior"
        if name == "noise_level" and self.image_noising_scheduler is None:
            return "this model's U-Net reads no image embedding"
        return None

    def _check_channels(self, *further: int) -> None:
        """Raises `UserError` unless the U-Net reads the autoencoder's latents, or so many `further` channels."""
        channels, read = self.vae.config.latent_channels, self.unet.config.in_channels
        if read not in (channels, *further) and read == 2 * channels + 1:
            raise UserError(
                f"this U-Net reads {read} channels, a mask beside latents: use LatentDiffusionInpaintPipeline"
            )
        if read not in (channels, *further):
            raise UserError(f"the U-Net reads {read} channels, but the autoencoder's latents have {channels}")

    def _check_outputs(self, output_type: str, callback: Callback | None, names: Sequence[str] | None) -> Sequence[str]:
        """The names of the tensors that the callback is shown: those that it asks for by itself, as Diffusers' own
        callbacks do, or else those given."""
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if callback is not None and not callable(callback):
            raise UserError(f"callback_on_step_end is a {type(callback).__name__}; give a function")
        names = getattr(callback, "tensor_inputs", names) or ()
        if unknown := [name for name in names if name not in self._callback_tensor_inputs]:
            raise UserError(
                f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; "
                f"there are {', '.join(self._callback_tensor_inputs)}"
            )
        return names

    # ---- what guides the U-Net ---------------------------------------------------------------------------------------

    def _condition(
        self,
        settings: Settings,
        prompt: str | list[str] | None,
        num_images_per_prompt: int,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        image_embeds: Tensor | None,
        generator: Generators,
        size: tuple[int, int],
        cross_attention_kwargs: dict[str, Any] | None,
        told: tuple[tuple[int, int] | None, ...] = (None, None, None),
    ) -> Condition:
        """Captions -> tokens, and image embeddings (B·n, D), the prior's where none are given, noised; for pictures of
        `size`, (H, W), of which the U-Net is `told` what `_sizes` takes first.

        Draws the prior's noise, then that of the embeddings.
        """
        sizes = self._sizes(*told, size)
        check_generator(generator)
        if not isinstance(cross_attention_kwargs, dict | None):
            raise UserError(f"cross_attention_kwargs is a {type(cross_attention_kwargs).__name__}; give a dictionary")
        guided = self._guidance_scale > 1
        device = self._execution_device
        with self._text_encoder_scaled(cross_attention_kwargs):
            prompt_embeds, negative_prompt_embeds = self._encode_prompt(
                prompt, device, num_images_per_prompt, guided, negative_prompt, prompt_embeds, negative_prompt_embeds,
                settings.clip_skip, size,
            )  # fmt: skip
        batch, _, width = prompt_embeds.shape  # B·n
        if isinstance(read := self.unet.config.cross_attention_dim, int) and width != read:
            raise UserError(f"prompt_embeds are {width} wide; this U-Net reads tokens of width {read}")
        check_generator(generator, batch)

        for name, given in (("prior_prompt_embeds", "prompt_embeds"), ("prior_latents", "latents")):
            if image_embeds is not None and settings.prior[given] is not None:
                raise UserError(f"{name} belongs to the prior, whose place image embeddings take here; leave it out")
        if image_embeds is None and self.prior is not None:
            image_embeds = self.sample_image_embeds(
                prompt, num_images_per_prompt, generator=generator, device=device, **settings.prior
            )
            if len(image_embeds) != batch:
                raise UserError(f"prior_prompt_embeds are of {len(image_embeds)} images, prompt_embeds of {batch}")
        if self.image_normalizer is not None and image_embeds is not None:
            check_shape("image_embeds", image_embeds, (batch, self.image_normalizer.config.embedding_dim))
            image_embeds = self.noise_image_embeds(
                image_embeds.to(device, prompt_embeds.dtype), settings.noise_level, generator
            )  # (B·n, 2D)
        elif image_embeds is not None or self.unet.config.class_embed_type is not None:
            raise UserError("an image embedding guides the U-Net only beside a prior; open a folder that has one")

        # Unconditional and conditional branch go through the U-Net as one batch; the former is told no image
        if guided:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            if image_embeds is not None:
                image_embeds = torch.cat([torch.zeros_like(image_embeds), image_embeds])
        return Condition(prompt_embeds, image_embeds, guided, settings, sizes, cross_attention_kwargs)

    def _sizes(
        self,
        original_size: tuple[int, int] | None,
        crops_coords_top_left: tuple[int, int] | None,
        target_size: tuple[int, int] | None,
        size: tuple[int, int],
    ) -> tuple[int, ...] | None:
        """The six numbers of `size_condition`, or None where the U-Net is not told them."""
        given = {
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size,
        }
        if self.unet.config.addition_embed_type != "text_time":
            if told := [name for name, value in given.items() if value is not None]:
                raise UserError(f"{told[0]}: this U-Net was not trained with size_conditioning; leave it out")
            return None
        return (
            *check_pair("original_size", given_or(original_size, size)),
            *check_pair("crops_coords_top_left", given_or(crops_coords_top_left, (0, 0)), smallest=0),
            *check_pair("target_size", given_or(target_size, size)),
        )

    def _size_condition(self, sizes: tuple[int, ...] | None, model_input: Tensor) -> dict[str, Tensor] | None:
        """`added_cond_kwargs` for every sample of the U-Net's input."""
        if sizes is None:
            return None
        numbers = torch.tensor([sizes] * len(model_input), dtype=torch.float32, device=model_input.device)
        config = self.unet.config
        return size_condition(numbers, config.projection_class_embeddings_input_dim, config.addition_time_embed_dim)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _set_timesteps(self, condition: Condition) -> Tensor:
        """All timesteps of the scheduler. It begins with the first, which by itself it would look up: where two are
        rounded to one number, as in Karras's spacing, it would take the second and run out at the end."""
        self.scheduler.set_timesteps(condition.settings.num_inference_steps, device=condition.prompt_embeds.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def _predict(self, latents: Tensor, t: Tensor, condition: Condition, known: Tensor | None = None) -> Tensor:
        """z_t (B, C, h, w) -> the U-Net's guided prediction, (B, C, h, w).

        known: (B, C', h, w), further channels that the U-Net reads at every step: a mask, and what is around it.
        """
        settings, scale = condition.settings, self._guidance_scale
        if settings.guidance_interval != (0.0, 1.0):
            noise_share = (1 - self.scheduler.alphas_cumprod[int(t)]).sqrt().item()
            scale = scale_in_interval(scale, noise_share, settings.guidance_interval)
        twice = condition.guided and scale > 1
        seen = slice(None if twice else -len(latents), None)  # or the conditional half alone
        model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if twice else latents, t)
        if known is not None:
            model_input = torch.cat([model_input, torch.cat([known] * 2) if twice else known], dim=1)
        prediction = self.unet(
            model_input,
            t,
            encoder_hidden_states=condition.prompt_embeds[seen],
            class_labels=None if condition.image_embeds is None else condition.image_embeds[seen],
            cross_attention_kwargs=condition.cross_attention_kwargs,
            added_cond_kwargs=self._size_condition(condition.sizes, model_input),
            return_dict=False,
        )[0]
        if twice:
            unconditional, conditional = prediction.chunk(2)
            prediction = classifier_free_guidance(unconditional, conditional, scale)
            if settings.guidance_rescale:
                prediction = rescale_guidance(prediction, conditional, settings.guidance_rescale)
        return prediction

    def _call_back(
        self,
        callback: Callback | None,
        names: Sequence[str],
        step: int,
        t: Tensor,
        latents: Tensor,
        condition: Condition,
    ) -> Tensor:
        """Shows the caller the tensors that it asked for, and takes those that it returns in their place."""
        if callback is None:
            return latents
        tensors = {
            "latents": latents,
            "prompt_embeds": condition.prompt_embeds,
            "image_embeds": condition.image_embeds,
        }
        tensors |= callback(self, step, t, {name: tensors[name] for name in names}) or {}
        condition.prompt_embeds, condition.image_embeds = tensors["prompt_embeds"], tensors["image_embeds"]
        return tensors["latents"]

    # ---- to and from latents -----------------------------------------------------------------------------------------

    def _first_noise(
        self, condition: Condition, size: tuple[int, int], generator: Generators, given: Tensor | None = None
    ) -> Tensor:
        """Standard normal (B, C, h, w) for images of `size`, (H, W), drawn or given."""
        factor, channels, embeds = self.vae_scale_factor, self.vae.config.latent_channels, condition.prompt_embeds
        shape = (condition.batch, channels, size[0] // factor, size[1] // factor)
        if given is None:
            given = randn_tensor(shape, generator=generator, device=embeds.device, dtype=embeds.dtype)
        check_shape("latents", given, shape)
        return given.to(embeds.device, embeds.dtype)

    def _first_latents(
        self, condition: Condition, size: tuple[int, int], generator: Generators, given: Tensor | None = None
    ) -> Tensor:
        """z_T: that noise at the scale of the scheduler."""
        return self._first_noise(condition, size, generator, given) * self.scheduler.init_noise_sigma

    def _encode_image(self, pixels: Tensor, batch: int, generator: Generators) -> Tensor:
        """N images (N, 3, H, W) in [-1, 1], N a divisor of the batch -> scaled latents (B, C, h, w), sampled from the
        encoder's distribution: once an image, or once a generator of a list."""
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        if isinstance(generator, list):
            pixels = pixels.repeat_interleave(batch // len(pixels), dim=0)
            sources = zip(pixels, generator, strict=True)
            latents = torch.cat([_sample(self.vae.encode(one[None]), source) for one, source in sources])
        else:
            latents = _sample(self.vae.encode(pixels), generator)
            latents = latents.repeat_interleave(batch // len(pixels), dim=0)
        return latents * self.vae.config.scaling_factor

    def _decode(self, latents: Tensor, condition: Condition, output_type: str) -> Tensor:
        """Scaled latents -> images (B, 3, H, W), about [-1, 1]; for `latent` the latents. Raises `RunError` where they
        are not finite."""
        image = latents
        if output_type != "latent":
            latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            image = self.vae.decode(latents, return_dict=False)[0]
        if not torch.isfinite(image).all():
            steps = condition.settings.num_inference_steps
            remedy = "a lower guidance_scale" if image.dtype == torch.float32 else "dtype=torch.float32"
            raise RunError(
                f"the image is not finite (guidance_scale {self._guidance_scale:g}, {steps} steps, {image.dtype}): "
                f"the weights or what was given are damaged, or overflow: try {remedy}"
            )
        return image

    def _output(self, image: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        image = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)


def _sample(encoded: Any, generator: torch.Generator | None) -> Tensor:
    """Latents of an encoder's output: autoencoders other than `AutoencoderKL` may have no distribution."""
    return encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents


def timesteps_of_strength(scheduler: SchedulerMixin, num_inference_steps: int, strength: float) -> Tensor:
    """The last `strength` share of the timesteps that were set, which the scheduler is told to begin with; none at 0.

    Whole steps, rounded down as in Diffusers; a step of a second-order scheduler is two timesteps.
    """
    start = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    return scheduler.timesteps[start * scheduler.order :]
