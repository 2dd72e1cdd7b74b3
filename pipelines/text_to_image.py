"""From text to an image: prior, U-Net, decoder.

    caption ─► CLIP text tower ─► tokens (B, L, D_t) ───────────────────────┐
                    └─► e_t (B, D) ─► prior ─► e_i (B, D) ─► noised (B, 2D) ─┤
                                              z_T (B, C, h, w) ─► U-Net ─► z_0 ─► decoder ─► image (B, 3, H, W)

The components are Diffusers' and Transformers' own, in the layout of `StableUnCLIPPipeline`, and with
`num_prior_samples=1` the pictures are that pipeline's. Without the prior's components the layout is
`StableDiffusionPipeline`'s, and the U-Net is guided by the tokens alone.
"""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from ldm import hub
from ldm.diffusion.guidance import classifier_free_guidance
from ldm.diffusion.prior import best_of, derived_generator
from ldm.errors import RunError, UserError
from pipelines.checks import check_count, check_prompt, check_scale, check_size

Generators = torch.Generator | list[torch.Generator] | None

DEFAULT_SETTINGS = {
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "noise_level": 0,
    "prior_num_inference_steps": 25,
    "prior_guidance_scale": 4.0,
    "num_prior_samples": 2,
}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentDiffusionPipeline(DiffusionPipeline):
    """Draws images from text. The arguments are the components of `StableUnCLIPPipeline`; the last six, those that make
    and noise the image embedding, may all be None.

    Settings are saved with the model: `pipe.default_settings = {...}`, then `save_pretrained`, or `save_config` to
    write them alone.
    """

    model_cpu_offload_seq = "prior_text_encoder->text_encoder->unet->vae"
    _exclude_from_cpu_offload = ["prior", "image_normalizer"]  # noqa: RUF012 (read by DiffusionPipeline as it stands)
    _prior_components = (
        "prior_tokenizer",
        "prior_text_encoder",
        "prior",
        "prior_scheduler",
        "image_normalizer",
        "image_noising_scheduler",
    )
    _optional_components = [*_prior_components]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds", "image_embeds"]  # noqa: RUF012

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
        self._guidance_scale = DEFAULT_SETTINGS["guidance_scale"]
        self._num_timesteps = 0

    # ---- opening and saving ------------------------------------------------------------------------------------------

    @classmethod
    def default(cls) -> "LatentDiffusionPipeline":
        """The bundled model, without a download."""
        return cls.from_pretrained(Path(__file__).parent / "default")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **kwargs) -> "LatentDiffusionPipeline":
        """Opens a folder, or a repository of the Hub at `revision`, after a check that it is whole.

        Computes in float32 whatever the files hold, unless `dtype` says otherwise. Further keyword arguments are
        `DiffusionPipeline.from_pretrained`'s. Raises `UserError` for a name or a folder that cannot be used.
        """
        folder = hub.resolve(name, revision)
        hub.check_components(folder)
        index = hub.read_json(folder / cls.config_name)
        for component in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):
            if component not in kwargs and component not in index:
                raise UserError(
                    f"'{folder}' is a {index.get('_class_name')} without '{component}'; "
                    "give a folder in the layout of StableUnCLIPPipeline or StableDiffusionPipeline"
                )
        if "torch_dtype" not in kwargs:  # the older name of dtype
            kwargs.setdefault("dtype", torch.float32)
        pipeline = super().from_pretrained(str(folder), **{"use_safetensors": True, **kwargs})
        if "_default_settings" in index:
            pipeline.default_settings = index["_default_settings"]
        return pipeline

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Writes `model_index.json` under the name of the stock pipeline whose layout this is, which opens it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)  # a path of this machine
        if self.prior is not None:
            index["_class_name"] = "StableUnCLIPPipeline"
        else:
            index = {key: value for key, value in index.items() if key not in self._prior_components}
            absent = {key: [None, None] for key in ("safety_checker", "feature_extractor", "image_encoder")}
            index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **absent}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def default_settings(self) -> dict[str, int | float]:
        """What `__call__` takes where it is given nothing: this model's own settings over the general ones."""
        return DEFAULT_SETTINGS | self.config.get("_default_settings", {})

    @default_settings.setter
    def default_settings(self, settings: dict[str, int | float]) -> None:
        """Saved with the model, under a key that stock Diffusers passes over."""
        if unknown := sorted(set(settings) - set(DEFAULT_SETTINGS)):
            raise UserError(f"unknown setting '{unknown[0]}'; the settings are {', '.join(DEFAULT_SETTINGS)}")
        self.register_to_config(_default_settings=dict(settings))

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    # ---- drawing -----------------------------------------------------------------------------------------------------

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

        Raises `UserError` for input that cannot be used and `RunError` if the result is not finite.
        """
        # 1. Settings and checks
        settings = self.default_settings
        num_inference_steps = _given(num_inference_steps, settings["num_inference_steps"])
        self._guidance_scale = check_scale("guidance_scale", _given(guidance_scale, settings["guidance_scale"]))
        _check_steps("num_inference_steps", num_inference_steps, self.scheduler)
        check_count("num_images_per_prompt", num_images_per_prompt)
        height, width = self._image_size(height, width)
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
            _check_shape("image_embeds", image_embeds, (batch, self.prior.config.embedding_dim))
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
            model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            prediction = self.unet(
                model_input,
                t,
                encoder_hidden_states=prompt_embeds,
                class_labels=image_embeds,
                cross_attention_kwargs=cross_attention_kwargs,
                return_dict=False,
            )[0]
            if guided:
                prediction = classifier_free_guidance(*prediction.chunk(2), self._guidance_scale)
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

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Captions and negative captions as tokens, each (B·n, L, D_t); the latter None where there is no guidance.

        Either may be given as tokens (B, L, D_t) instead of text. One negative prompt serves all prompts.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise UserError("give either prompt or prompt_embeds, and not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise UserError("give either negative_prompt or negative_prompt_embeds, and not both")

        if prompt_embeds is None:
            prompt_embeds = self._read("prompt", check_prompt("prompt", prompt), device)
        if prompt_embeds.ndim != 3:
            raise UserError(f"prompt_embeds has shape {tuple(prompt_embeds.shape)}; it must be (texts, tokens, width)")
        batch, length, width = prompt_embeds.shape
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative = check_prompt("negative_prompt", _given(negative_prompt, ""), may_be_empty=True)
            if len(negative) not in (1, batch):
                raise UserError(f"negative_prompt has {len(negative)} texts for {batch} prompts; give one, or {batch}")
            negative_prompt_embeds = self._read("negative_prompt", negative, device).expand(batch, -1, -1)

        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            _check_shape("negative_prompt_embeds", negative_prompt_embeds, (batch, length, width))
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

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

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _read(self, name: str, texts: list[str], device: torch.device) -> Tensor:
        """Texts -> (B, L, D_t): the last hidden states of the text tower. Warns of what is beyond its context."""
        length = self.tokenizer.model_max_length
        for ids in self.tokenizer(texts).input_ids:
            if len(ids) > length:  # the end token takes the last place
                cut = self.tokenizer.decode(ids[length - 1 : -1]).strip()
                warnings.warn(f"{name} is beyond the {length} tokens this model reads; not read: {cut!r}", stacklevel=2)
        return self.text_encoder(_tokenize(self.tokenizer, texts).input_ids.to(device))[0]

    def _read_for_prior(self, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Texts -> projected embedding (B, D), last hidden states (B, L, D_t), and which tokens are text (B, L)."""
        inputs = _tokenize(self.prior_tokenizer, texts)
        output = self.prior_text_encoder(inputs.input_ids.to(device))
        return output.text_embeds, output.last_hidden_state, inputs.attention_mask.bool().to(device)

    def _noise(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        given: Tensor | None,
        scheduler: SchedulerMixin,
    ) -> Tensor:
        """Where a sampler starts: standard normal noise, drawn or given, at the scale of the scheduler."""
        if given is None:
            given = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        _check_shape(name, given, shape)
        return given.to(device) * scheduler.init_noise_sigma

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        trained = self.unet.config.sample_size
        trained = (trained, trained) if isinstance(trained, int) else trained
        height = trained[0] * self.vae_scale_factor if height is None else height
        width = trained[1] * self.vae_scale_factor if width is None else width
        return check_size("height", height, self.vae_scale_factor), check_size("width", width, self.vae_scale_factor)

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


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; these settings need {shape}")


def _tokenize(tokenizer: CLIPTokenizer, texts: list[str]):
    """Texts -> ids and mask, (B, L), cut to the context."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")


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
