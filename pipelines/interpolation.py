"""Between two images or two texts, in frames: image embeddings and noises along the great circle, tokens along a line.

    two images ─► CLIP image tower ─┐
    two texts ─► prior ─────────────┴► e_i (2, D) ─slerp─► (F, D) ─► U-Net ─► F images
                                       z_T (2, C, h, w) ─slerp─► (F, C, h, w) ──┘

Ramesh et al. 2022 (arXiv:2204.06125), §3.2, with noises drawn instead of found by inverting the decoder. The first and
the last frame are the pictures that the two ends give by themselves.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ldm.diffusion.interpolation import slerp
from ldm.errors import UserError
from pipelines.base import Generators, PriorPrompt, check_generator, step_options
from pipelines.checks import check_at_once, check_prompt, known_arguments
from pipelines.drawing import Callback, Condition
from pipelines.image_tower import LatentDiffusionFromImages, first_generator
from pipelines.packing import draws_packed
from pipelines.pictures import Pictures


class LatentDiffusionInterpolationPipeline(LatentDiffusionFromImages):
    """Draws the way from one picture to another. The components are those of `LatentDiffusionFromImages`."""

    @known_arguments
    @torch.no_grad()
    @draws_packed
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        num_frames: int = 9,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
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
        num_prior_samples: int | None = None,
        prior_prompt_embeds: PriorPrompt | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_frames` >= 2 images. The arguments are `LatentDiffusionPipeline`'s, and:

        image: two, as `read_pictures` takes them.
        prompt: two texts; beside two images also one text for both, or None: no text.
        image_embeds: (2, D), CLIP image embeddings in place of `image`. Without either the prior samples them from the
            texts.
        generator: one, or a list of two, one for each end; the first is also that of the sampler's steps.
        latents: (2, C, H/f, W/f), the noises of the ends, in place of drawn ones.
        """
        settings = self._settings(
            num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, eta, noise_level,
            prior_num_inference_steps, prior_guidance_scale, num_prior_samples, prior_prompt_embeds,
        )  # fmt: skip
        check_generator(generator, 2)
        shown = self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        size = self._image_size(height, width)
        check_at_once("num_frames", num_frames, size=size, smallest=2)
        device = self._execution_device

        # The two ends
        if image is not None and image_embeds is not None:
            raise UserError("give either image or image_embeds, and not both")
        if image is not None:
            image_embeds = self.embed_images("image", image)
            if len(image_embeds) != 2:
                raise UserError(f"image holds {len(image_embeds)} pictures; give two, the first and the last")
        if prompt is not None:
            texts = check_prompt("prompt", prompt)
            prompt = texts * 2 if len(texts) == 1 and image_embeds is not None else texts
            if len(prompt) != 2:
                raise UserError(f"prompt holds {len(prompt)} texts; give two, the first and the last")
        elif image_embeds is not None:
            prompt_embeds = self._tokens_beside_images(prompt, prompt_embeds, 2)
        ends = self._condition(
            settings, prompt, 1, negative_prompt, prompt_embeds, negative_prompt_embeds, image_embeds, generator,
            size, cross_attention_kwargs,
        )  # fmt: skip
        noise = self._first_noise(ends, size, generator, latents)

        # What lies between them
        shares = torch.linspace(0, 1, num_frames, device=device)
        embeds = None
        if ends.image_embeds is not None:
            first, last = image_part(ends)
            embeds = slerp(first, last, shares)
        condition = frames_of(ends, shares, embeds)
        timesteps = self._set_timesteps(condition)
        latents = slerp(noise[0], noise[1], shares) * self.scheduler.init_noise_sigma  # (F, C, h, w)

        # z_T -> z_0
        options = step_options(self.scheduler, first_generator(generator), eta)
        for i, t in enumerate(self.progress_bar(timesteps)):
            prediction = self._predict(latents, t, condition)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
            latents = self._call_back(callback_on_step_end, shown, i, t, latents, condition)

        # z_0 -> image
        return self._output(self._decode(latents, condition, output_type), output_type, return_dict)


def image_part(condition: Condition) -> Tensor:
    """The noised image embeddings, (B, D), without the embedded noise level and the unconditional half."""
    embeds = condition.image_embeds[-condition.batch :]
    return embeds[:, : embeds.shape[1] // 2]


def frames_of(ends: Condition, shares: Tensor, embeds: Tensor | None) -> Condition:
    """What guides F frames between the first and the last of `ends`: tokens along the line, at `shares` (F,) of the
    way, and image embeddings (F, D) as given, of the noise level of the ends."""
    halves = ends.prompt_embeds.chunk(2) if ends.guided else (ends.prompt_embeds,)
    tokens = torch.cat([torch.lerp(half[:1], half[-1:], shares[:, None, None].to(half)) for half in halves])
    if embeds is not None:
        level = ends.image_embeds[-1:, embeds.shape[1] :].expand(len(embeds), -1)
        embeds = torch.cat([embeds, level], dim=1)
        if ends.guided:
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
    return replace(ends, prompt_embeds=tokens, image_embeds=embeds)
