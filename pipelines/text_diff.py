"""An image changed step by step as a text says: its CLIP embedding turned towards the difference of two texts.

    z_d = norm(z_t - z_t0), the texts' embeddings;  z_θ = slerp(z_i, z_d, θ), θ from 0 to `largest_share`

Ramesh et al. 2022 (arXiv:2204.06125), §3.3, with the noise drawn instead of found by inverting the decoder: the first
frame is the variation of the image from that noise.
"""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ldm.diffusion.interpolation import slerp, text_diff_direction
from ldm.errors import UserError
from pipelines.base import Generators, step_options, warn_of_cut
from pipelines.checks import check_at_once, check_prompt, check_share, known_arguments
from pipelines.drawing import Callback
from pipelines.image_tower import LatentDiffusionFromImages, first_generator
from pipelines.interpolation import frames_of, image_part
from pipelines.packing import draws_packed
from pipelines.pictures import Pictures


class LatentDiffusionTextDiffPipeline(LatentDiffusionFromImages):
    """Draws an image ever more as a text says. The components are those of `LatentDiffusionFromImages`."""

    model_cpu_offload_seq = "image_encoder->prior_text_encoder->text_encoder->unet->vae"

    @known_arguments
    @torch.no_grad()
    @draws_packed
    def __call__(
        self,
        image: Pictures | None = None,
        prompt: str | None = None,
        base_prompt: str = "",
        num_frames: int = 9,
        largest_share: float = 0.5,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
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
        """Draws `num_frames` >= 2 images, all from one noise. The arguments are `LatentDiffusionPipeline`'s, and:

        image: one, as `read_pictures` takes them. image_embeds: (1, D), its CLIP embedding in its place.
        prompt: what the image becomes, such as "a photo of a truck"; base_prompt: what it is, such as "a photo of a
            car", or nothing.
        largest_share: in [0, 1], how far the last frame is turned; the paper's are 0.25 to 0.5.
        latents: (1, C, H/f, W/f), the noise, in place of what is drawn.

        The U-Net reads no text beside the embedding.
        """
        settings = self._settings(
            num_inference_steps, guidance_scale, guidance_rescale, guidance_interval, eta, noise_level
        )
        check_share("largest_share", largest_share)
        shown = self._check_outputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        size = self._image_size(height, width)
        check_at_once("num_frames", num_frames, size=size, smallest=2)
        device = self._execution_device

        # The image, and the direction in which it changes
        embeds = self._given_or_read(image, image_embeds)
        if len(embeds) != 1:
            raise UserError(f"image holds {len(embeds)} pictures; give one")
        direction = self._direction(prompt, base_prompt)
        start = self._condition(
            settings, None, 1, negative_prompt, self._tokens_beside_images(None, None, 1), None, embeds, generator,
            size, cross_attention_kwargs,
        )  # fmt: skip
        (embed,) = image_part(start)

        # The frames
        shares = torch.linspace(0, largest_share, num_frames, device=device)
        condition = frames_of(start, shares, slerp(embed, embed.norm() * direction.to(embed), shares))
        timesteps = self._set_timesteps(condition)
        latents = self._first_latents(start, size, generator, latents).repeat(num_frames, 1, 1, 1)

        # z_T -> z_0
        options = step_options(self.scheduler, first_generator(generator), eta)
        for i, t in enumerate(self.progress_bar(timesteps)):
            prediction = self._predict(latents, t, condition)
            latents = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
            latents = self._call_back(callback_on_step_end, shown, i, t, latents, condition)

        # z_0 -> image
        return self._output(self._decode(latents, condition, output_type), output_type, return_dict)

    def _direction(self, prompt: str | None, base_prompt: str) -> Tensor:
        """norm(z_t - z_t0), (D,)."""
        if self.prior_text_encoder is None:
            raise UserError("this model does not embed texts and images alike; open a folder that has a prior")
        texts = check_prompt("prompt", prompt) + check_prompt("base_prompt", base_prompt, may_be_empty=True)
        if len(texts) != 2:
            raise UserError(f"prompt and base_prompt hold {len(texts)} texts; give one each")
        warn_of_cut("prompt", self.prior_tokenizer, texts[:1])
        warn_of_cut("base_prompt", self.prior_tokenizer, texts[1:])
        text_embeds, base_text_embeds = self._embed_for_prior(texts, self._execution_device)[0]
        try:
            return text_diff_direction(text_embeds, base_text_embeds)
        except ValueError as error:
            raise UserError(f"prompt {texts[0]!r} and base_prompt {texts[1]!r}: {error}") from None
