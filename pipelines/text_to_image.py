"""From text to an image: prior, U-Net, decoder.

    caption ─► CLIP text tower ─► tokens (B, L, D_t) ───────────────────────┐
                    └─► e_t (B, D) ─► prior ─► e_i (B, D) ─► noised (B, 2D) ─┤
                                              z_T (B, C, h, w) ─► U-Net ─► z_0 ─► decoder ─► image (B, 3, H, W)

The components are Diffusers' and Transformers' own, in the layout of `StableUnCLIPPipeline`, and with
`num_prior_samples=1` the pictures are that pipeline's. Without the prior's components the layout is
`StableDiffusionPipeline`'s, and the U-Net is guided by the tokens alone.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.diffusion.guidance import classifier_free_guidance, rescale_guidance, scale_in_interval
from ldm.diffusion.prior import best_of, derived_generator
from ldm.diffusion.size_condition import size_condition
from ldm.errors import RunError, UserError
from pipelines.base import DEFAULT_SETTINGS, Generators, LatentDiffusionBase
from pipelines.checks import (
    check_count,
    check_interval,
    check_pair,
    check_prompt,
    check_scale,
    check_shape,
    check_share,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentDiffusionPipeline(LatentDiffusionBase):
    """Draws images from text. The components are those of `LatentDiffusionBase`."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "image_embeds"]  # noqa: RUF012 (read by DiffusionPipeline)
    _guidance_scale = DEFAULT_SETTINGS["guidance_scale"]
    _num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        noise_level: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        prior_latents: Tensor | None = None,
        num_prior_samples: int | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_images_per_prompt` images of each prompt. Settings left None are `default_settings`.

        prompt: text, or a list of B texts; None with `prompt_embeds` (B, L, D_t).
        height, width: pixels, multiples of the autoencoder's factor; the size the U-Net was trained at if None.
        num_inference_steps, prior_num_inference_steps: network evaluations of the U-Net and of the prior, >= 1.
        guidance_scale, prior_guidance_scale: >= 0; classifier-free guidance above 1.
        negative_prompt: what the unconditional branch of the U-Net reads instead of "".
        eta: η of DDIM (arXiv:2010.02502), eq. 16, in [0, 1]; for schedulers that have it.
        generator: one, or a list of one for each image: image i is then that of a run of its own.
        latents: (B·n, C, H/f, W/f), standard normal, in place of drawn ones. prior_latents: (B·n, D), likewise.
        image_embeds: (B·n, D), CLIP image embeddings in place of the prior's samples.
        output_type: `pil`, `np` (B, H, W, 3) in [0, 1], `pt` (B, 3, H, W) in [0, 1], or `latent` (scaled latents).
        callback_on_step_end: called as f(pipe, step, timestep, tensors) after each step of the U-Net with the tensors
            named in `callback_on_step_end_tensor_inputs`; those that it returns replace them.
        noise_level: 0..T-1, the timestep at which the image embedding is noised before the U-Net reads it.
        num_prior_samples: of so many samples of the prior the one closest to the text is kept (`best_of`). The further
            ones are drawn from generators derived from `generator`, which therefore draws the same in either case.
        guidance_rescale: 0..1, how far the guided prediction's standard deviation is brought back (`rescale_guidance`).
        guidance_interval: guidance only where √(1 - ᾱ_t), the share of noise, lies between these two numbers
            (`scale_in_interval`); elsewhere the U-Net runs once a step, not twice.
        original_size, crops_coords_top_left, target_size: what a U-Net trained with `size_conditioning` is told of the
            image: the size it had, (height, width); the corner of its crop, (top, left); its size now. If None:
            (height, width), (0, 0), (height, width).

        Raises `UserError` for input that cannot be used and `RunError` if the result is not finite.
        """
        # 1. Settings and checks
        settings = self.default_settings
        num_inference_steps = _given(num_inference_steps, settings["num_inference_steps"])
        self._guidance_scale = check_scale("guidance_scale", _given(guidance_scale, settings["guidance_scale"]))
        guidance_rescale = check_share("guidance_rescale", _given(guidance_rescale, settings["guidance_rescale"]))
        guidance_interval = check_interval(
            "guidance_interval", _given(guidance_interval, settings["guidance_interval"])
        )
        _check_steps("num_inference_steps", num_inference_steps, self.scheduler)
        check_count("num_images_per_prompt", num_images_per_prompt)
        height, width = self._image_size(height, width)
        sizes = self._sizes(original_size, crops_coords_top_left, target_size, (height, width))
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)
        guided = self._guidance_scale > 1
        device = self._execution_device

        # 2. Caption -> tokens that the U-Net attends to
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt, device, num_images_per_prompt, guided, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        batch = len(prompt_embeds)  # B·n
        if isinstance(generator, list) and len(generator) != batch:
            raise UserError(f"generator is a list of {len(generator)}; {batch} images need as many")

        # 3. Caption -> image embedding
        if self.prior is not None:
            if image_embeds is None:
                image_embeds = self.sample_image_embeds(
                    prompt,
                    num_images_per_prompt,
                    _given(prior_num_inference_steps, settings["prior_num_inference_steps"]),
                    _given(prior_guidance_scale, settings["prior_guidance_scale"]),
                    _given(num_prior_samples, settings["num_prior_samples"]),
                    generator,
                    prior_latents,
                    eta,
                )
            check_shape("image_embeds", image_embeds, (batch, self.prior.config.embedding_dim))
            image_embeds = self.noise_image_embeds(
                image_embeds.to(device, prompt_embeds.dtype), _given(noise_level, settings["noise_level"]), generator
            )  # (B·n, 2D)
        elif image_embeds is not None or self.unet.config.class_embed_type is not None:
            raise UserError("an image embedding guides the U-Net only beside a prior; open a folder that has one")

        # 4. Unconditional and conditional branch go through the U-Net as one batch
        if guided:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
            if image_embeds is not None:
                image_embeds = torch.cat([torch.zeros_like(image_embeds), image_embeds])

        # 5. z_T -> z_0
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        shape = (batch, self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        latents = self._noise("latents", shape, prompt_embeds.dtype, device, generator, latents, self.scheduler)
        step_options = _step_options(self.scheduler, generator, eta)

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scale = self._guidance_scale
            if guidance_interval != (0.0, 1.0):
                noise_share = (1 - self.scheduler.alphas_cumprod[int(t)]).sqrt().item()
                scale = scale_in_interval(scale, noise_share, guidance_interval)
            twice = guided and scale != 1
            seen = slice(None) if twice or not guided else slice(batch, None)  # the conditional half alone
            model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if twice else latents, t)
            prediction = self.unet(
                model_input,
                t,
                encoder_hidden_states=prompt_embeds[seen],
                class_labels=None if image_embeds is None else image_embeds[seen],
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=self._size_condition(sizes, model_input),
                return_dict=False,
            )[0]
            if twice:
                unconditional, conditional = prediction.chunk(2)
                prediction = classifier_free_guidance(unconditional, conditional, scale)
                if guidance_rescale:
                    prediction = rescale_guidance(prediction, conditional, guidance_rescale)
            latents = self.scheduler.step(prediction, t, latents, **step_options, return_dict=False)[0]

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "prompt_embeds": prompt_embeds, "image_embeds": image_embeds}
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors |= callback_on_step_end(self, i, t, shown) or {}
                latents, prompt_embeds, image_embeds = (tensors[name] for name in self._callback_tensor_inputs)

        # 6. z_0 -> image
        image = latents
        if output_type != "latent":
            image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        if not torch.isfinite(image).all():
            raise RunError(
                f"the image is not finite (guidance_scale {self._guidance_scale:g}, {num_inference_steps} steps, "
                f"{image.dtype}): the weights are damaged, or overflow: try dtype=torch.float32"
            )
        image = self.image_processor.postprocess(image, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    @torch.no_grad()
    def sample_image_embeds(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = DEFAULT_SETTINGS["prior_num_inference_steps"],
        guidance_scale: float = DEFAULT_SETTINGS["prior_guidance_scale"],
        num_samples: int = DEFAULT_SETTINGS["num_prior_samples"],
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """The prior: B captions -> (B·n, D) CLIP image embeddings, each the best of `num_samples` samples."""
        if prompt is None:
            raise UserError("prompt_embeds alone cannot guide the prior; give image_embeds too, or a prompt")
        prompts = check_prompt("prompt", prompt)
        _check_steps("prior_num_inference_steps", num_inference_steps, self.prior_scheduler)
        check_scale("prior_guidance_scale", guidance_scale)
        check_count("num_prior_samples", num_samples)
        if isinstance(self.prior_scheduler, UnCLIPScheduler):
            warnings.warn(
                "UnCLIPScheduler takes single timesteps whatever their number: the prior's samples stay noise; "
                "set pipe.prior_scheduler = DDPMScheduler.from_config(pipe.prior_scheduler.config)",
                stacklevel=2,
            )
        guided = guidance_scale > 1
        device = self._execution_device

        # 1. Caption -> e_t (B·n, D), tokens (B·n, L, D_t) and which of them are text (B·n, L), and those of ""
        texts = [prompts, [""] * len(prompts)] if guided else [prompts]
        embeds, tokens, masks = zip(*(self._read_for_prior(text, device) for text in texts), strict=True)
        embeds, tokens, masks = (
            torch.cat([part.repeat_interleave(num_images_per_prompt, dim=0) for part in reversed(parts)])
            for parts in (embeds, tokens, masks)
        )
        batch = len(prompts) * num_images_per_prompt
        text_embeds = embeds[-batch:]

        # 2. Noise -> e_i, num_samples times
        shape = (batch, self.prior.config.embedding_dim)
        samples = []
        for source in _sources(generator, num_samples):
            given = latents if not samples else None
            sample = self._noise(
                "prior_latents", shape, embeds.dtype, device, source, given, self.prior_scheduler
            )  # (B·n, D), normalised
            self.prior_scheduler.set_timesteps(num_inference_steps, device=device)
            step_options = _step_options(self.prior_scheduler, source, eta)
            for t in self.progress_bar(self.prior_scheduler.timesteps):
                model_input = self.prior_scheduler.scale_model_input(torch.cat([sample] * 2) if guided else sample, t)
                prediction = self.prior(
                    model_input,
                    timestep=t,
                    proj_embedding=embeds,
                    encoder_hidden_states=tokens,
                    attention_mask=masks,
                ).predicted_image_embedding
                if guided:
                    prediction = classifier_free_guidance(*prediction.chunk(2), guidance_scale)
                sample = self.prior_scheduler.step(prediction, t, sample, **step_options, return_dict=False)[0]
            samples.append(self.prior.post_process_latents(sample))

        # 3. The one closest to the text
        return best_of(torch.stack(samples, dim=1), text_embeds)

    def noise_image_embeds(self, image_embeds: Tensor, noise_level: int, generator: Generators = None) -> Tensor:
        """(B, D) image embeddings -> (B, 2D): noised in normalised coordinates, and the embedded noise level."""
        last = self.image_noising_scheduler.config.num_train_timesteps - 1
        check_count("noise_level", noise_level, smallest=0, largest=last)
        noise = randn_tensor(
            image_embeds.shape, generator=generator, device=image_embeds.device, dtype=image_embeds.dtype
        )
        levels = torch.full((len(image_embeds),), noise_level, device=image_embeds.device)
        self.image_normalizer.to(image_embeds.device)
        noised = self.image_noising_scheduler.add_noise(self.image_normalizer.scale(image_embeds), noise, levels)
        level_embeds = get_timestep_embedding(
            levels, image_embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([self.image_normalizer.unscale(noised), level_embeds.to(image_embeds.dtype)], dim=1)

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
            *check_pair("original_size", _given(original_size, size)),
            *check_pair("crops_coords_top_left", _given(crops_coords_top_left, (0, 0)), smallest=0),
            *check_pair("target_size", _given(target_size, size)),
        )

    def _size_condition(self, sizes: tuple[int, ...] | None, model_input: Tensor) -> dict[str, Tensor] | None:
        """`added_cond_kwargs` for every sample of the U-Net's input."""
        if sizes is None:
            return None
        numbers = torch.tensor([sizes] * len(model_input), dtype=torch.float32, device=model_input.device)
        config = self.unet.config
        return size_condition(numbers, config.projection_class_embeddings_input_dim, config.addition_time_embed_dim)

    def _check_outputs(self, output_type: str, tensors: tuple[str, ...]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        if unknown := [name for name in tensors if name not in self._callback_tensor_inputs]:
            raise UserError(
                f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; "
                f"there are {', '.join(self._callback_tensor_inputs)}"
            )


def _given(value, default):
    return default if value is None else value


def _check_steps(name: str, steps: object, scheduler: SchedulerMixin) -> None:
    smallest = 2 if isinstance(scheduler, UnCLIPScheduler) else 1  # UnCLIPScheduler divides by the steps less one
    check_count(name, steps, smallest, scheduler.config.num_train_timesteps)


def _step_options(scheduler: SchedulerMixin, generator: Generators, eta: float) -> dict[str, Any]:
    """Of `generator` and `eta`, what this scheduler's step takes."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


def _sources(generator: Generators, count: int) -> list[Generators]:
    """Generators of `count` samples of the prior: the caller's own, then derived ones that leave it untouched."""
    further = range(1, count)
    if generator is None:
        return [None] * count
    if isinstance(generator, list):
        return [generator, *([derived_generator(one, index) for one in generator] for index in further)]
    return [generator, *(derived_generator(generator, index) for index in further)]
