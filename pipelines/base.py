"""The components of a text-to-image model, the reading of text, and the prior."""

import inspect
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.prior import best_of, derived_generator
from ldm.errors import UserError
from pipelines.checks import check_at_once, check_count, check_prompt, check_scale, check_shape, check_size
from pipelines.folder import PRIOR_COMPONENTS, LatentDiffusionFolder
from pipelines.reading_once import told
from pipelines.settings import DEFAULT_SETTINGS, MOST_SAMPLES, Check

Generators = torch.Generator | list[torch.Generator] | None


class PriorPrompt(NamedTuple):
    """What the prior reads of B captions: first, B times, of "", then of the captions."""

    embeds: Tensor
    """(2B, D), projected."""
    tokens: Tensor
    """(2B, L, D_t)"""
    mask: Tensor
    """(2B, L), true for tokens that are text."""


class LatentDiffusionBase(LatentDiffusionFolder):
    """What every pipeline of this package has, whatever it draws from. The arguments are the components of
    `StableUnCLIPPipeline`; the last six, those that make and noise the image embedding, may all be None.

    Settings are saved with the model: `pipe.default_settings = {...}`, then `save_pretrained`, or `save_config` to
    write them alone.
    """

    model_cpu_offload_seq = "text_encoder->prior_text_encoder->unet->vae"
    _exclude_from_cpu_offload = ["prior", "image_normalizer"]  # noqa: RUF012 (read by DiffusionPipeline as it stands)
    _optional_components = [*PRIOR_COMPONENTS]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        prior_tokenizer: CLIPTokenizer | None = None,
        prior_text_encoder: CLIPTextModelWithProjection | None = None,
        prior: PriorTransformer | None = None,
        prior_scheduler: KarrasDiffusionSchedulers | None = None,
        image_normalizer: StableUnCLIPImageNormalizer | None = None,
        image_noising_scheduler: KarrasDiffusionSchedulers | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            prior_tokenizer=prior_tokenizer,
            prior_text_encoder=prior_text_encoder,
            prior=prior,
            prior_scheduler=prior_scheduler,
            image_normalizer=image_normalizer,
            image_noising_scheduler=image_noising_scheduler,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def _closer_checks(self) -> dict[str, Check]:
        checks: dict[str, Check] = {}
        if self.scheduler is not None:
            checks["num_inference_steps"] = partial(check_steps, scheduler=self.scheduler)
        if self.prior_scheduler is not None:
            checks["prior_num_inference_steps"] = partial(check_steps, scheduler=self.prior_scheduler)
        if self.image_noising_scheduler is not None:
            checks["noise_level"] = lambda _, value: self._check_noise_level(value)
        return checks

    # ---- reading text ------------------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, PriorPrompt]:
        """Captions and negative captions as tokens, each (B·n, L, D_t); the latter None where there is no guidance.

        Either may be given as tokens (B, L, D_t) instead of text. One negative prompt serves all prompts. Where there
        is a prior's text tower, what it reads of the captions comes third. `__call__` takes each by its name.
        """
        prompt_embeds, negative_prompt_embeds = self._encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds,
            negative_prompt_embeds, clip_skip,
        )  # fmt: skip
        if self.prior_text_encoder is not None and prompt is not None:
            prior_prompt_embeds = self._read_for_prior(check_prompt("prompt", prompt), device)
            return prompt_embeds, negative_prompt_embeds, prior_prompt_embeds
        return prompt_embeds, negative_prompt_embeds

    def _encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        clip_skip: int | None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the U-Net reads. clip_skip: layers of the text tower that captions leave out, as stock has it not the
        negative ones. size: (H, W) of the pictures, if they are to be drawn."""
        if (prompt is None) == (prompt_embeds is None):
            raise UserError("give either prompt or prompt_embeds, and not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise UserError("give either negative_prompt or negative_prompt_embeds, and not both")

        if prompt is not None:
            texts = check_prompt("prompt", prompt)
        elif not isinstance(prompt_embeds, Tensor) or prompt_embeds.ndim != 3:
            shape = getattr(prompt_embeds, "shape", None)
            what = f"is a {type(prompt_embeds).__name__}" if shape is None else f"has shape {tuple(shape)}"
            raise UserError(f"prompt_embeds {what}; it must be a tensor (texts, tokens, width)")
        batch = len(prompt_embeds if prompt is None else texts)
        check_at_once("num_images_per_prompt", num_images_per_prompt, batch, size)
        if prompt_embeds is None:
            prompt_embeds = self._read("prompt", texts, device, clip_skip)
        _, length, width = prompt_embeds.shape
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative = check_prompt(
                "negative_prompt", "" if negative_prompt is None else negative_prompt, may_be_empty=True
            )
            if len(negative) not in (1, batch):
                raise UserError(
                    f"negative_prompt holds {len(negative)} texts; give one for all prompts, or as many as prompts, "
                    f"{batch}"
                )
            negative_prompt_embeds = self._read("negative_prompt", negative, device).expand(batch, -1, -1)

        dtype = (self.text_encoder if self.unet is None else self.unet).dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            check_shape("negative_prompt_embeds", negative_prompt_embeds, (batch, length, width))
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def _read(self, name: str, texts: list[str], device: torch.device, clip_skip: int | None = None) -> Tensor:
        """Texts -> (B, L, D_t): the last hidden states of the text tower, or those `clip_skip` layers before them,
        normalised like them. Warns of what is beyond its context."""
        warn_of_cut(name, self.tokenizer, texts)
        input_ids = _tokenize(self.tokenizer, texts).input_ids.to(device)
        if clip_skip is None:
            return self.text_encoder(input_ids)[0]
        check_count("clip_skip", clip_skip, smallest=0, largest=self.text_encoder.config.num_hidden_layers)
        hidden_states = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        tower = getattr(self.text_encoder, "text_model", self.text_encoder)
        return tower.final_layer_norm(hidden_states[-(clip_skip + 1)])

    def _embed_for_prior(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Texts -> projected embedding (B, D), last hidden states (B, L, D_t), and which tokens are text (B, L)."""
        inputs = _tokenize(self.prior_tokenizer, texts)
        output = self.prior_text_encoder(inputs.input_ids.to(device))
        return output.text_embeds, output.last_hidden_state, inputs.attention_mask.bool().to(device)

    def _read_for_prior(self, texts: list[str], device: torch.device) -> PriorPrompt:
        return PriorPrompt(*self._embed_for_prior([""] * len(texts) + texts, device))

    # ---- the prior ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_image_embeds(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = DEFAULT_SETTINGS["prior_num_inference_steps"],
        guidance_scale: float = DEFAULT_SETTINGS["prior_guidance_scale"],
        num_samples: int = DEFAULT_SETTINGS["num_prior_samples"],
        generator: Generators = None,
        latents: Tensor | None = None,
        eta: float = 0.0,
        prompt_embeds: PriorPrompt | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """The prior: B captions -> (B·n, D) CLIP image embeddings, each the best of `num_samples` samples.

        prompt_embeds: in place of the captions, what `encode_prompt` gives last.
        device: where the pipeline computes, for callers that have looked it up, which takes a millisecond or two.
        """
        device = self._execution_device if device is None else device
        if prompt is not None and prompt_embeds is not None:
            raise UserError("give either prompt or prior_prompt_embeds, and not both")
        if prompt_embeds is None:
            if prompt is None:
                raise UserError(
                    "prompt_embeds alone cannot guide the prior; "
                    "give image_embeds too, or prior_prompt_embeds, or a prompt instead"
                )
            texts = check_prompt("prompt", prompt)
            check_at_once("num_images_per_prompt", num_images_per_prompt, len(texts))
            prompt_embeds = self._read_for_prior(texts, device)
        prompt_embeds = self._check_prior_prompt(prompt_embeds, device)
        check_at_once("num_images_per_prompt", num_images_per_prompt, len(prompt_embeds.embeds) // 2)
        check_steps("prior_num_inference_steps", num_inference_steps, self.prior_scheduler)
        check_scale("prior_guidance_scale", guidance_scale)
        check_count("num_prior_samples", num_samples, largest=MOST_SAMPLES)
        guided = guidance_scale > 1

        # 1. e_t (B·n, D), tokens (B·n, L, D_t) and which of them are text (B·n, L); those of "" before them
        embeds, tokens, masks = (part.repeat_interleave(num_images_per_prompt, dim=0) for part in prompt_embeds)
        batch = len(embeds) // 2
        check_generator(generator, batch)
        text_embeds = embeds[batch:]
        if not guided:
            embeds, tokens, masks = (part[batch:] for part in (embeds, tokens, masks))

        # 2. Noise -> e_i, num_samples times
        predict = told(self.prior, embeds, tokens, masks)
        shape = (batch, self.prior.config.embedding_dim)
        samples = []
        for source in _sources(generator, num_samples):
            noise = latents
            if noise is None or samples:
                noise = randn_tensor(shape, generator=source, device=device, dtype=embeds.dtype)
            check_shape("prior_latents", noise, shape)
            sample = noise.to(embeds) * self.prior_scheduler.init_noise_sigma  # (B·n, D), normalised
            self.prior_scheduler.set_timesteps(num_inference_steps, device=device)
            options = step_options(self.prior_scheduler, source, eta)
            timesteps = self.prior_scheduler.timesteps
            for i, t in enumerate(self.progress_bar(timesteps)):
                if isinstance(self.prior_scheduler, UnCLIPScheduler):  # it does not know its own steps
                    options["prev_timestep"] = timesteps[i + 1] if i + 1 < len(timesteps) else None
                model_input = self.prior_scheduler.scale_model_input(torch.cat([sample] * 2) if guided else sample, t)
                prediction = predict(model_input, t)
                if guided:
                    prediction = classifier_free_guidance(*prediction.chunk(2), guidance_scale)
                sample = self.prior_scheduler.step(prediction, t, sample, **options, return_dict=False)[0]
            samples.append(self.prior.post_process_latents(sample))

        # 3. The one closest to the text
        return best_of(torch.stack(samples, dim=1), text_embeds)

    def _check_prior_prompt(self, prompt: PriorPrompt, device: torch.device) -> PriorPrompt:
        """On the device. Raises `UserError` unless it is of the prior's sizes."""
        prior = self.prior.config
        if not isinstance(prompt, tuple) or len(prompt) != 3 or not all(isinstance(part, Tensor) for part in prompt):
            raise UserError(
                f"prior_prompt_embeds is a {type(prompt).__name__}; give what encode_prompt gives last, three tensors"
            )
        rows, width = max(2, len(prompt[0]) // 2 * 2), prior.embedding_dim
        tokens = (rows, prior.num_embeddings, width)
        shapes = ((rows, prior.embedding_proj_dim or width), tokens, tokens[:2])
        for name, part, shape in zip(PriorPrompt._fields, prompt, shapes, strict=True):
            check_shape(f"prior_prompt_embeds.{name}", part, shape)
        return PriorPrompt(*(part.to(device, self.prior.dtype) for part in prompt[:2]), prompt[2].to(device))

    def noise_image_embeds(self, image_embeds: Tensor, noise_level: int, generator: Generators = None) -> Tensor:
        """(B, D) image embeddings -> (B, 2D): noised in normalised coordinates, and the embedded noise level."""
        self._check_noise_level(noise_level)
        noise = randn_tensor(
            image_embeds.shape, generator=generator, device=image_embeds.device, dtype=image_embeds.dtype
        )
        levels = torch.full((len(image_embeds),), noise_level, device=image_embeds.device)
        self.image_normalizer.to(image_embeds.device)
        noised = self.image_noising_scheduler.add_noise(self.image_normalizer.scale(image_embeds), noise, levels)
        level_embeds = get_timestep_embedding(
            levels, image_embeds.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([self.image_normalizer.unscale(noised), level_embeds], dim=1).to(image_embeds.dtype)

    def _check_noise_level(self, noise_level: object) -> None:
        last = self.image_noising_scheduler.config.num_train_timesteps - 1
        check_count("noise_level", noise_level, smallest=0, largest=last)

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        trained = self.unet.config.sample_size
        if trained is None and (height is None or width is None):
            raise UserError("height and width are needed: this U-Net does not tell the size that it was trained at")
        trained = (trained, trained) if isinstance(trained, int) else trained
        height = trained[0] * self.vae_scale_factor if height is None else height
        width = trained[1] * self.vae_scale_factor if width is None else width
        return check_size("height", height, self.vae_scale_factor), check_size("width", width, self.vae_scale_factor)


def warn_of_cut(name: str, tokenizer: CLIPTokenizer, texts: list[str]) -> None:
    """Says what of the texts is beyond the context, and not read."""
    length = tokenizer.model_max_length
    for ids in tokenizer(texts).input_ids:
        if len(ids) > length:  # the end token takes the last place
            cut = tokenizer.decode(ids[length - 1 : -1]).strip()
            lost = repr(cut) if len(cut) <= 200 else f"{cut[:150]!r} … {cut[-40:]!r}, {len(cut)} characters"
            warnings.warn(f"{name} is beyond the {length} tokens this model reads; not read: {lost}", stacklevel=3)


def _tokenize(tokenizer: CLIPTokenizer, texts: list[str]):
    """Texts -> ids and mask, (B, L), cut to the context."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


def given_or(value, default):
    return default if value is None else value


def check_generator(generator: object, batch: int | None = None) -> None:
    """Raises `UserError` for anything but a generator, or a list of them, `batch` long where that is known."""
    for one in generator if isinstance(generator, list) else [generator]:
        if (one is None and one is not generator) or not isinstance(one, torch.Generator | None):
            raise UserError(
                f"generator holds a {type(one).__name__} ({one!r}); give torch.Generator().manual_seed(0), or a list "
                "of such"
            )
    if isinstance(generator, list) and batch is not None and len(generator) != batch:
        raise UserError(f"generator is a list of {len(generator)}; give one generator, or as many as images, {batch}")


def check_steps(name: str, steps: object, scheduler: SchedulerMixin) -> None:
    smallest = 2 if isinstance(scheduler, UnCLIPScheduler) else 1  # UnCLIPScheduler divides by the steps less one
    check_count(name, steps, smallest, scheduler.config.num_train_timesteps)


def step_options(scheduler: SchedulerMixin, generator: Generators, eta: float) -> dict[str, Any]:
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
