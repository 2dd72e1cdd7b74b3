"""From text to an image: prior, U-Net, decoder.

    caption ─► CLIP text tower ─► tokens (B, L, D_t) ───────────────────────┐
                    └─► e_t (B, D) ─► prior ─► e_i (B, D) ─► noised (B, 2D) ─┤
                                              z_T (B, C, h, w) ─► U-Net ─► z_0 ─► decoder ─► image (B, 3, H, W)

The components are Diffusers' and Transformers' own, in the layout of `StableUnCLIPPipeline`, and with
`num_prior_samples=1` the pictures are that pipeline's. Without the prior's components the layout is
`StableDiffusionPipeline`'s, and the U-Net is guided by the tokens alone.
"""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from pipelines.base import Generators, PriorPrompt, step_options
from pipelines.checks import known_arguments
from pipelines.drawing import Callback, LatentDiffusionDrawing
from pipelines.packing import draws_packed


class LatentDiffusionPipeline(LatentDiffusionDrawing):
    """Draws images from text. The components are those of `LatentDiffusionBase`."""

    @known_arguments
    @torch.no_grad()
    @draws_packed
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
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
        noise_level: int | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        prior_latents: Tensor | None = None,
        num_prior_samples: int | None = None,
        prior_prompt_embeds: PriorPrompt | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_skip: int | None = None,
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
        prior_prompt_embeds: with `prompt_embeds`, what the prior reads of the prompts: `encode_prompt` gives all three.
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
        clip_skip: how many of its last layers the text tower leaves out for `prompt`.
        original_size, crops_coords_top_left, target_size: what a U-Net trained with `size_conditioning` is told of the
            image: the size it had, (height, width); the corner of its crop, (top, left); its size now. If None:
            (height, width), (0, 0), (height, width).

        Raises `UserError` for input that cannot be used and `RunError` if the result is not finite.
        """
        settings = self._settings(
            num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, eta, noise_level,
            prior_num_inference_steps, prior_guidance_scale, num_prior_samples, prior_prompt_embeds,
            prior_latents, clip_skip,
        )  # fmt: skip
        height, width = self._image_size(height, width)
        shown = self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # Caption -> tokens and image embedding
        condition = self._condition(
            settings, prompt, num_images_per_prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            image_embeds, generator, (height, width), cross_attention_kwargs,
            (original_size, crops_coords_top_left, target_size),
        )  # fmt: skip

        # z_T -> z_0
        timesteps = self._set_timesteps(condition)
        latents = self._first_latents(condition, (height, width), generator, latents)
        options = step_options(self.scheduler, generator, eta)
        for i, t in enumerate(self.progress_bar(timesteps)):
            prediction = self._predict(latents, t, condition)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
            latents = self._call_back(callback_on_step_end, shown, i, t, latents, condition)

        # z_0 -> image
        image = self._decode(latents, condition, output_type)
        return self._output(image, output_type, return_dict)
