"""From an image, a mask and a text to the image with what is under the mask drawn anew.

    U-Nets of as many channels as the latents: at every step what lies outside of the mask is put back, noised to that
        step, as in RePaint (Lugmayr et al. 2022, arXiv:2201.09865) without its resampling.
    U-Nets of twice as many and one more: they read latents, mask and the masked image's latents (Rombach et al. 2022,
        §4.5), and have learned to fit one to the other.

In the layout of `StableDiffusionPipeline`, and with `composite=False`, the pictures are those of stock
`StableDiffusionInpaintPipeline`.
"""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ldm.errors import UserError
from pipelines.base import Generators, PriorPrompt, step_options
from pipelines.checks import check_share, known_arguments
from pipelines.drawing import Callback, LatentDiffusionDrawing, timesteps_of_strength
from pipelines.image_to_image import check_pictures_of
from pipelines.packing import draws_packed
from pipelines.pictures import Pictures, read_masks, read_pictures, size_of, size_to_draw


class LatentDiffusionInpaintPipeline(LatentDiffusionDrawing):
    """Draws a part of an image anew. The components are those of `LatentDiffusionBase`."""

    @known_arguments
    @torch.no_grad()
    @draws_packed
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float = 1.0,
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
        num_prior_samples: int | None = None,
        prior_prompt_embeds: PriorPrompt | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        clip_skip: int | None = None,
        composite: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws `num_images_per_prompt` images of each prompt. The arguments are `LatentDiffusionPipeline`'s, and:

        image: one for all prompts, or one for each, as `read_pictures` takes them.
        mask_image: of the image's size, as `read_masks` takes them: white is drawn anew, black is kept.
        strength: in [0, 1], the share of the `num_inference_steps` that are taken, from the image noised so far; 1
            starts from noise.
        height, width: pixels to which image and mask are scaled; their own size if None, rounded down to the factor.
        latents: (B·n, C, H/f, W/f), the noise, in place of what is drawn.
        composite: outside of the mask the pixels are the image's own, not the autoencoder's reconstruction of them; no
            matter for `output_type="latent"`.

        Draws the prior's noise, the encoder's for the image, the sampler's, then the encoder's for the masked image.
        """
        settings = self._settings(
            num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, eta, noise_level,
            prior_num_inference_steps, prior_guidance_scale, num_prior_samples, prior_prompt_embeds,
            clip_skip=clip_skip,
        )  # fmt: skip
        check_share("strength", strength)
        shown = self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        pictures, masks = read_pictures("image", image), read_masks("mask_image", mask_image)
        if size_of(masks) != size_of(pictures):
            raise UserError(
                "mask_image is {}×{} pixels, image {}×{}; give them one size".format(
                    *reversed(size_of(masks)), *reversed(size_of(pictures))
                )
            )
        height, width = size_to_draw(size_of(pictures), height, width, self.vae_scale_factor)
        pixels = self.image_processor.preprocess(pictures, height, width)  # (N, 3, H, W) in [-1, 1]
        mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        mask = mask_processor.preprocess(masks, height, width)  # (N, 1, H, W), 0 or 1

        # Caption -> tokens and image embedding
        condition = self._condition(
            settings, prompt, num_images_per_prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            image_embeds, generator, (height, width), cross_attention_kwargs,
        )  # fmt: skip
        batch, device, dtype = condition.batch, self._execution_device, condition.prompt_embeds.dtype
        check_pictures_of("image", len(pixels), batch // num_images_per_prompt)
        check_pictures_of("mask_image", len(mask), batch // num_images_per_prompt)

        # Image -> z_t, and what is known of it at every step
        self.scheduler.set_timesteps(settings.num_inference_steps, device=device)
        timesteps = timesteps_of_strength(self.scheduler, settings.num_inference_steps, strength)
        self._num_timesteps = len(timesteps)
        told = self.unet.config.in_channels != self.vae.config.latent_channels  # the U-Net reads the mask
        small_mask = torch.nn.functional.interpolate(
            mask, size=(height // self.vae_scale_factor, width // self.vae_scale_factor)
        )
        small_mask = small_mask.to(device, dtype).repeat_interleave(batch // len(mask), dim=0)  # (B, 1, h, w)
        image_latents = None
        if not told or strength < 1:
            image_latents = self._encode_image(pixels, batch, generator).to(dtype)
        noise = self._first_noise(condition, (height, width), generator, latents)
        if strength == 1:
            latents = noise * self.scheduler.init_noise_sigma
        elif len(timesteps):
            latents = self.scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(batch))
        else:
            latents = image_latents
        known = None
        if told:
            masked = pixels * (mask < 0.5)
            known = torch.cat([small_mask, self._encode_image(masked, batch, generator).to(dtype)], dim=1)

        # z_t -> z_0
        options = step_options(self.scheduler, generator, eta)
        for i, t in enumerate(self.progress_bar(timesteps)):
            prediction = self._predict(latents, t, condition, known)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
            if not told:
                around = image_latents
                if i + 1 < len(timesteps):
                    around = self.scheduler.add_noise(image_latents, noise, timesteps[i + 1 : i + 2].repeat(batch))
                latents = (1 - small_mask) * around + small_mask * latents
            latents = self._call_back(callback_on_step_end, shown, i, t, latents, condition)

        # z_0 -> image
        drawn = self._decode(latents, condition, output_type)
        if composite and output_type != "latent":
            kept, painted = (x.to(drawn).repeat_interleave(batch // len(x), dim=0) for x in (pixels, mask))
            drawn = torch.where(painted > 0.5, drawn, kept)
        return self._output(drawn, output_type, return_dict)

    def _check_channels(self) -> None:
        super()._check_channels(2 * self.vae.config.latent_channels + 1)
