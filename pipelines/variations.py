"""From an image to others of the same content: its CLIP embedding in place of the prior's sample.

    image ─► CLIP image tower ─► e_i (B, D) ─► noised (B, 2D) ─► U-Net ─► z_0 ─► decoder ─► image

What CLIP does not see of an image, the U-Net invents (Ramesh et al. 2022, arXiv:2204.06125, §3.1). In the layout of
`StableUnCLIPPipeline` the pictures are those of stock `StableUnCLIPImg2ImgPipeline`.
"""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from pipelines.base import Generators, step_options
from pipelines.checks import check_at_once, check_prompt, known_arguments
from pipelines.drawing import Callback
from pipelines.image_to_image import check_pictures_of
from pipelines.image_tower import LatentDiffusionFromImages
from pipelines.packing import draws_packed
from pipelines.pictures import Pictures


class LatentDiffusionVariationPipeline(LatentDiffusionFromImages):
    """Draws variations of images. The components are those of `LatentDiffusionFromImages`."""

    @known_arguments
    @torch.no_grad()
    @draws_packed
    def __call__(
        self,
        image: Pictures | None = None,
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
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_images_per_prompt` variations of each image. The arguments are `LatentDiffusionPipeline`'s, and:

        image: one or N, as `read_pictures` takes them; one serves all prompts.
        prompt: what the U-Net reads beside the image, one for all images or one for each; nothing if None.
        image_embeds: (N, D), CLIP image embeddings in place of `image`.
        noise_level: the larger, the less of the image is kept.
        """
        settings = self._settings(
            num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, eta, noise_level
        )
        shown = self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        height, width = self._image_size(height, width)

        # Image -> image embedding
        image_embeds = self._given_or_read(image, image_embeds)
        count = len(image_embeds)
        if prompt is not None:
            prompts = check_prompt("prompt", prompt)
            prompt = prompts * count if len(prompts) == 1 else prompts
            check_pictures_of("image", count, len(prompt))
            image_embeds = image_embeds.expand(len(prompt), -1)
        check_at_once("num_images_per_prompt", num_images_per_prompt, len(image_embeds), (height, width))
        image_embeds = image_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        prompt_embeds = self._tokens_beside_images(prompt, prompt_embeds, count)

        # Caption -> tokens, beside the image embedding
        condition = self._condition(
            settings, prompt, num_images_per_prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            image_embeds, generator, (height, width), cross_attention_kwargs,
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
        return self._output(self._decode(latents, condition, output_type), output_type, return_dict)
