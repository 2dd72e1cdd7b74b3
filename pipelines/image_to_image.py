"""From an image and a text to another image: the image half noised, and denoised as the text says.

    image ─► encoder ─► z_0 ─► noised to z_t ─► U-Net, the last `strength` share of the steps ─► decoder ─► image

SDEdit (Meng et al. 2022, arXiv:2108.01073). In the layout of `StableDiffusionPipeline` the pictures are those of stock
`StableDiffusionImg2ImgPipeline`, but for strength 1.
"""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldm.errors import UserError
from pipelines.base import Generators, PriorPrompt, step_options
from pipelines.checks import check_share, known_arguments
from pipelines.drawing import Callback, LatentDiffusionDrawing, timesteps_of_strength
from pipelines.packing import draws_packed
from pipelines.pictures import Pictures, read_pictures, size_of, size_to_draw


class LatentDiffusionImg2ImgPipeline(LatentDiffusionDrawing):
    """Draws an image anew. The components are those of `LatentDiffusionBase`."""

    @known_arguments
    @torch.no_grad()
    @draws_packed
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
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
        clip_skip: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_images_per_prompt` images of each prompt. The arguments are `LatentDiffusionPipeline`'s, and:

        image: one for all prompts, or one for each, as `read_pictures` takes them.
        strength: in [0, 1], the share of the `num_inference_steps` that are taken. 0 gives the image back as the
            autoencoder reconstructs it; 1 starts from noise, as text-to-image does, where stock leaves a trace of the
            image in it.
        height, width: pixels to which the image is scaled; its own size if None, rounded down to the factor.

        Draws the prior's noise, the encoder's, then the sampler's.
        """
        settings = self._settings(
            num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, eta, noise_level,
            prior_num_inference_steps, prior_guidance_scale, num_prior_samples, prior_prompt_embeds,
            clip_skip=clip_skip,
        )  # fmt: skip
        check_share("strength", strength)
        shown = self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        pictures = read_pictures("image", image)
        height, width = size_to_draw(size_of(pictures), height, width, self.vae_scale_factor)
        pixels = self.image_processor.preprocess(pictures, height, width)  # (N, 3, H, W) in [-1, 1]

        # Caption -> tokens and image embedding
        condition = self._condition(
            settings, prompt, num_images_per_prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            image_embeds, generator, (height, width), cross_attention_kwargs,
        )  # fmt: skip
        check_pictures_of("image", len(pixels), condition.batch // num_images_per_prompt)

        # Image -> z_t
        self.scheduler.set_timesteps(settings.num_inference_steps, device=self._execution_device)
        timesteps = timesteps_of_strength(self.scheduler, settings.num_inference_steps, strength)
        self._num_timesteps = len(timesteps)
        if strength == 1:
            latents = self._first_latents(condition, (height, width), generator)
        else:
            latents = self._encode_image(pixels, condition.batch, generator).to(condition.prompt_embeds.dtype)
            if len(timesteps):
                noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
                latents = self.scheduler.add_noise(latents, noise, timesteps[:1].repeat(condition.batch))

        # z_t -> z_0
        options = step_options(self.scheduler, generator, eta)
        for i, t in enumerate(self.progress_bar(timesteps)):
            prediction = self._predict(latents, t, condition)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
            latents = self._call_back(callback_on_step_end, shown, i, t, latents, condition)

        # z_0 -> image
        return self._output(self._decode(latents, condition, output_type), output_type, return_dict)


def check_pictures_of(name: str, count: int, prompts: int) -> None:
    """Raises `UserError` unless there is one picture for all prompts, or one for each."""
    if count not in (1, prompts):
        raise UserError(f"{name} holds {count} pictures; give one for all prompts, or as many as prompts, {prompts}")
