"""CLIP's other half: what reads images, which lies beside the pipeline's components in its folder."""

import json
import shutil
from pathlib import Path
from typing import Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.modeling_clip import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from ldm import hub
from ldm.clip.parts import IMAGE_ENCODER, PROCESSORS
from ldm.errors import UserError
from pipelines.base import Generators
from pipelines.drawing import LatentDiffusionDrawing
from pipelines.pictures import Pictures, as_images, read_pictures


class LatentDiffusionFromImages(LatentDiffusionDrawing):
    """What every pipeline has that starts from the CLIP embedding of an image. The arguments are the components of
    `LatentDiffusionBase` and CLIP's image tower, which is opened and saved with them, though `model_index.json` does
    not name it: stock pipelines pass over its folders."""

    model_cpu_offload_seq = "image_encoder->text_encoder->prior_text_encoder->unet->vae"
    _optional_components = [*LatentDiffusionDrawing._optional_components, IMAGE_ENCODER, "feature_extractor"]  # noqa: RUF012

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
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ):
        super().__init__(
            vae, text_encoder, tokenizer, unet, scheduler, prior_tokenizer, prior_text_encoder, prior, prior_scheduler,
            image_normalizer, image_noising_scheduler,
        )  # fmt: skip
        self.register_modules(image_encoder=image_encoder, feature_extractor=feature_extractor)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **kwargs) -> Self:
        """As `LatentDiffusionBase.from_pretrained`, with the image tower where the folder has one."""
        options = {key: kwargs.pop(key) for key in hub.DOWNLOAD_OPTIONS if key in kwargs}
        variant = kwargs.get("variant")
        folder = hub.resolve(name, revision, variant, **options)
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype", torch.float32))
        if isinstance(dtype, dict):
            dtype = dtype.get(IMAGE_ENCODER, dtype.get("default", torch.float32))
        return super().from_pretrained(folder, **_image_tower(folder, dtype, variant) | kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """As `LatentDiffusionBase.from_pipe`, with the image tower of the folder that the pipeline was opened from, on
        the device that it computes on."""
        if getattr(pipeline, IMAGE_ENCODER, None) is None:
            folder = getattr(pipeline, "folder", None) or pipeline.config.get("_name_or_path")
            if folder is not None:
                tower = _image_tower(Path(folder), pipeline.unet.dtype, getattr(pipeline, "variant", None))
                if tower:
                    tower[IMAGE_ENCODER].to(pipeline._execution_device)
                kwargs = tower | kwargs
        return super().from_pipe(pipeline, **kwargs)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = hub.read_json(path)
        if self.prior is not None:
            index = {key: value for key, value in index.items() if key not in (IMAGE_ENCODER, PROCESSORS[1])}
        elif self.image_normalizer is not None:  # the layout of StableUnCLIPImg2ImgPipeline, which has these
            own = json.loads(self.to_json_string()) | {"_class_name": "StableUnCLIPImg2ImgPipeline"}
            index = {key: value for key, value in own.items() if value != [None, None] and key != "_name_or_path"}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        ours, stock = (Path(save_directory) / name for name in PROCESSORS)
        if stock.is_dir() and PROCESSORS[1] not in index:  # written just before this
            shutil.rmtree(ours, ignore_errors=True)
            stock.rename(ours)

    def embed_images(self, name: str, image: Pictures) -> Tensor:
        """Images -> CLIP image embeddings (N, D), not normalised: what the prior samples."""
        if self.unet.config.class_embed_type is None:
            raise UserError(f"{name}: captions alone guide this model's U-Net; take one that image embeddings guide")
        if self.image_encoder is None or self.feature_extractor is None:
            raise UserError(
                f"{name} is read by CLIP's image tower, which this model lacks: open a folder that holds "
                f"{IMAGE_ENCODER}/ and {PROCESSORS[0]}/, or give image_encoder= and feature_extractor="
            )
        images = as_images(read_pictures(name, image))
        pixels = self.feature_extractor(images=images, return_tensors="pt").pixel_values
        return self.image_encoder(pixels.to(self._execution_device, self.image_encoder.dtype)).image_embeds

    def _given_or_read(self, image: Pictures | None, image_embeds: Tensor | None) -> Tensor:
        """The embeddings given, or those of the image given, (N, D)."""
        if (image is None) == (image_embeds is None):
            raise UserError("give either image or image_embeds, and not both")
        if image_embeds is None:
            return self.embed_images("image", image)
        if not isinstance(image_embeds, Tensor) or image_embeds.ndim != 2:
            shape = getattr(image_embeds, "shape", None)
            what = f"is a {type(image_embeds).__name__}" if shape is None else f"has shape {tuple(shape)}"
            raise UserError(f"image_embeds {what}; it must be a tensor (images, width)")
        return image_embeds

    def _tokens_beside_images(
        self, prompt: str | list[str] | None, prompt_embeds: Tensor | None, count: int
    ) -> Tensor | None:
        """Without a text the U-Net reads "", as it did where captions were dropped: tokens (count, L, D_t)."""
        if prompt is not None or prompt_embeds is not None:
            return prompt_embeds
        return self._read("prompt", [""], self._execution_device).expand(count, -1, -1)


def _image_tower(folder: Path, dtype: torch.dtype, variant: str | None = None) -> dict:
    """The image tower of a folder, as components; {} where it has none."""
    processor = next((folder / name for name in PROCESSORS if (folder / name).is_dir()), None)
    if processor is None or not (folder / IMAGE_ENCODER).is_dir():
        return {}
    encoder = hub.check_component(folder / IMAGE_ENCODER, (CLIPVisionModelWithProjection.__name__,), variant)
    hub.check_finite(encoder)
    hub.check_shapes(encoder)
    hub.check_component(processor, (CLIPImageProcessor.__name__,))
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    variant = variant if variant and encoder.is_of(variant) else None
    return {
        IMAGE_ENCODER: CLIPVisionModelWithProjection.from_pretrained(
            folder / IMAGE_ENCODER, dtype=dtype, use_safetensors=True, variant=variant
        ),
        "feature_extractor": CLIPImageProcessor.from_pretrained(processor),
    }


def first_generator(generator: Generators) -> torch.Generator | None:
    """That of the sampler's steps, where a list has one for each end rather than for each frame."""
    return generator[0] if isinstance(generator, list) else generator
