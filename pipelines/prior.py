"""The prior alone: from a text to the CLIP embedding of an image of it."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers.pipelines.kandinsky.pipeline_kandinsky_prior import KandinskyPriorPipelineOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ldm import hub
from ldm.errors import RunError, UserError
from pipelines.base import Generators, LatentDiffusionBase, PriorPrompt, check_steps, given_or, warn_of_cut
from pipelines.checks import check_count, check_prompt, check_scale, check_share, known_arguments
from pipelines.folder import refuse_code_and_pickles
from pipelines.settings import MOST_SAMPLES

OUTPUT_TYPES = ("pt", "np")


KANDINSKY = ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline")


class LatentDiffusionPriorPipeline(LatentDiffusionBase):
    """Samples image embeddings. Of the components of `LatentDiffusionBase` those of the prior are used."""

    no_image: Tensor | None = None
    """(1, D), what stands for no image where that is not zeros."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **kwargs) -> Self:
        """As `LatentDiffusionBase.from_pretrained`; opens the priors of Kandinsky 2.1 and 2.2, too, whose
        `negative_image_embeds` are the embedding of an image of zeros."""
        refuse_code_and_pickles(kwargs)
        options = {key: kwargs.pop(key) for key in hub.DOWNLOAD_OPTIONS if key in kwargs}
        folder = hub.resolve(name, revision, kwargs.get("variant"), **options)
        if hub.read_json(folder / cls.config_name).get("_class_name") not in KANDINSKY:
            return super().from_pretrained(folder, **kwargs)
        for component in hub.check_components(folder, variant=kwargs.get("variant")).values():
            hub.check_finite(component)
            hub.check_shapes(component)
        stock = DiffusionPipeline.from_pretrained(
            str(folder), **{"use_safetensors": True, "dtype": torch.float32, **kwargs}
        )
        own = cls(
            **dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "scheduler")),
            prior=stock.prior,
            prior_text_encoder=stock.text_encoder,
            prior_tokenizer=stock.tokenizer,
            prior_scheduler=stock.scheduler,
        )
        with torch.no_grad():
            own.no_image = stock.get_zero_embed()
        own.commit, own.folder = hub.commit_of(folder), folder
        return own

    def save_pretrained(self, *args, **kwargs) -> None:
        if self.no_image is not None:
            raise UserError(f"Kandinsky's prior is no folder of this package; copy '{self.folder}', which it came from")
        super().save_pretrained(*args, **kwargs)

    @known_arguments
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_samples: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prior_prompt_embeds: PriorPrompt | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> KandinskyPriorPipelineOutput | tuple[Tensor | np.ndarray, Tensor | np.ndarray]:
        """`num_images_per_prompt` embeddings of each of B prompts, (B·n, D), and the ones that stand for no image.

        Given to the pipelines that draw as `image_embeds`, the former make the pictures that these draw from the text.
        The latter, `negative_image_embeds`, are zeros: what the U-Net has learned to read where it is told no image
        (of Kandinsky's prior: `no_image`).

        num_inference_steps, guidance_scale, num_samples: `prior_num_inference_steps`, `prior_guidance_scale`,
            `num_prior_samples` of `default_settings` if None; see `LatentDiffusionPipeline`.
        latents: (B·n, D), standard normal, in place of drawn ones.
        prior_prompt_embeds: in place of `prompt`, what `encode_prompt` gives last.
        output_type: `pt` or `np`.

        Raises `UserError` for input that cannot be used and `RunError` if the result is not finite.
        """
        if self.prior is None:
            raise UserError("this model has no prior; open a folder that has one")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
        defaults = self.default_settings
        steps = given_or(num_inference_steps, defaults["prior_num_inference_steps"])
        scale = given_or(guidance_scale, defaults["prior_guidance_scale"])
        samples = given_or(num_samples, defaults["num_prior_samples"])
        check_steps("num_inference_steps", steps, self.prior_scheduler)
        check_scale("guidance_scale", scale)
        check_count("num_samples", samples, largest=MOST_SAMPLES)
        if prior_prompt_embeds is None:
            prompt = check_prompt("prompt", prompt)
            warn_of_cut("prompt", self.prior_tokenizer, prompt)
        image_embeds = self.sample_image_embeds(
            prompt,
            num_images_per_prompt,
            steps,
            scale,
            samples,
            generator,
            latents,
            check_share("eta", eta),
            prior_prompt_embeds,
        )
        if not torch.isfinite(image_embeds).all():
            raise RunError("the prior's samples are not finite: the weights are damaged, or guidance_scale is too high")
        negative_image_embeds = torch.zeros_like(image_embeds)
        if self.no_image is not None:
            negative_image_embeds = negative_image_embeds + self.no_image.to(image_embeds)
        self.maybe_free_model_hooks()
        if output_type == "np":
            image_embeds, negative_image_embeds = (
                x.float().cpu().numpy() for x in (image_embeds, negative_image_embeds)
            )
        if not return_dict:
            return image_embeds, negative_image_embeds
        return KandinskyPriorPipelineOutput(image_embeds, negative_image_embeds)
