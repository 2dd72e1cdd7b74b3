"""Which classes a component may be of, and between which bounds the numbers of its configuration must lie.

A configuration of a few bytes can ask for a network of any size, so that its numbers are bounded before it is built;
that they are those of the weights is checked afterwards, at no cost (`ldm/components/shapes.py`).
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError

TEXT_TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
IMAGE_TOWERS = ("CLIPVisionModelWithProjection", "CLIPVisionModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "UnCLIPScheduler",
)
CLASSES = {
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
    "text_encoder": TEXT_TOWERS,
    "tokenizer": TOKENIZERS,
    "scheduler": SCHEDULERS,
    "prior": ("PriorTransformer",),
    "prior_text_encoder": ("CLIPTextModelWithProjection",),
    "prior_tokenizer": TOKENIZERS,
    "prior_scheduler": SCHEDULERS,
    "image_normalizer": ("StableUnCLIPImageNormalizer",),
    "image_noising_scheduler": SCHEDULERS,
    "image_encoder": IMAGE_TOWERS,
    "image_processor": IMAGE_PROCESSORS,
    "feature_extractor": IMAGE_PROCESSORS,
}
"""Of each component of the layouts that are opened, the classes that it may be of."""

CONFIG_FILES = {
    TOKENIZERS: "tokenizer_config.json",
    SCHEDULERS: "scheduler_config.json",
    IMAGE_PROCESSORS: "preprocessor_config.json",
}

LARGEST_JSON = 128 * 2**20  # bytes; a tokenizer's vocabulary is a few million
LONGEST_LIST = 64

LARGEST = {
    # How many layers are built, which no weight's shape bounds
    "layers_per_block": 64,
    "transformer_layers_per_block": 64,
    "num_layers": 256,
    "num_hidden_layers": 256,
    # Sizes of weights
    "in_channels": 2**16,
    "out_channels": 2**16,
    "latent_channels": 2**16,
    "block_out_channels": 2**16,
    "cross_attention_dim": 2**16,
    "projection_class_embeddings_input_dim": 2**20,
    "num_class_embeds": 2**24,
    "addition_time_embed_dim": 2**16,
    "time_embedding_dim": 2**16,
    "time_embed_dim": 2**16,
    "time_cond_proj_dim": 2**16,
    "encoder_hid_dim": 2**16,
    "embedding_dim": 2**16,
    "embedding_proj_dim": 2**16,
    "clip_embed_dim": 2**16,
    "num_embeddings": 2**16,
    "conv_in_kernel": 63,
    "conv_out_kernel": 63,
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "projection_dim": 2**16,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**16,
    "image_size": 2**14,
    "patch_size": 2**14,
    "num_channels": 2**10,
    # What divides them
    "attention_head_dim": 2**16,
    "num_attention_heads": 2**16,
    "addition_embed_type_num_heads": 2**16,
    "norm_num_groups": 2**16,
    # Not of the weights
    "sample_size": 2**14,
    "num_train_timesteps": 100_000,
}
"""Whole numbers > 0 and what they may at most be, wherever they stand, alone or in lists."""

POSITIVE = ("norm_eps", "layer_norm_eps", "scaling_factor", "mid_block_scale_factor", "resnet_out_scale_factor",
            "beta_start", "beta_end", "clip_sample_range", "sample_max_value")  # fmt: skip
"""Finite numbers > 0."""

CHOICES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"),
}
MANDATORY = {
    "AutoencoderKL": ("block_out_channels", "latent_channels"),
    "UNet2DConditionModel": ("block_out_channels", "in_channels", "cross_attention_dim"),
    "PriorTransformer": ("embedding_dim", "num_layers"),
    "StableUnCLIPImageNormalizer": ("embedding_dim",),
    **dict.fromkeys((*TEXT_TOWERS, *IMAGE_TOWERS), ("hidden_size", "num_hidden_layers")),
}
"""What the classes would otherwise replace by numbers of a model that this one is not."""

FIRST_WITH_SCALING_FACTOR = (0, 12)
"""The release of Diffusers that began to write `scaling_factor`: autoencoders saved before had Stable Diffusion's."""


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises `UserError` where it is missing or is not one."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"'{path}' is larger than any configuration; copy or write it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing; the folder is incomplete: copy or write it again") from None
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read ({type(error).__name__}); copy or write it again") from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' does not hold a JSON object; copy or write it again")
    return content


def config_path(folder: Path, class_name: str) -> Path:
    """Where a component of this class keeps its configuration."""
    return folder / next((file for classes, file in CONFIG_FILES.items() if class_name in classes), "config.json")


def missing(name: str, path: Path, further: str = "") -> UserError:
    return UserError(f"component '{name}' missing: expected {path}{further}")


def check_class(name: str, entry: object) -> str:
    """The class in an entry [library, class] of `model_index.json`. Raises `UserError` if it is none of `CLASSES`."""
    library, class_name = entry
    if class_name in CLASSES[name] and library in ("diffusers", "transformers", "stable_diffusion"):
        return class_name
    got = class_name if library in ("diffusers", "transformers", "stable_diffusion") else f"{library}.{class_name}"
    raise _wrong_class(name, CLASSES[name], got)


def written_class(folder: Path, classes: tuple[str, ...]) -> str:
    """Of which of `classes` the component in `folder` says it is. Raises `UserError` for none."""
    if not (path := config_path(folder, classes[0])).is_file():
        raise missing(folder.name, path)
    if classes[0] in TOKENIZERS + IMAGE_PROCESSORS:
        return classes[0]
    config = read_json(path)
    written = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if written == "CLIPModel" and classes[0].startswith("CLIP"):  # of which these are the towers
        written = next(name for name in classes if name.endswith("WithProjection"))
    if written not in classes:
        raise _wrong_class(folder.name, classes, written)
    return written


def read_config(folder: Path, class_name: str) -> dict[str, Any]:
    """The configuration of the component in `folder`. Raises `UserError` where it is missing, of another class, or out
    of bounds."""
    path = config_path(folder, class_name)
    if not path.is_file():
        raise missing(folder.name, path)
    config = read_json(path)
    if class_name in TOKENIZERS:
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise missing(folder.name, folder / "tokenizer.json")
        return config
    if class_name not in IMAGE_PROCESSORS:
        _check_written_class(folder.name, class_name, config)
        _check_values(f"{folder.name}/{path.name}", class_name, config)
    return config


def _check_written_class(name: str, class_name: str, config: dict[str, Any]) -> None:
    """Diffusers' configurations name their class, Transformers' maybe the whole of which it is a part."""
    if class_name in TEXT_TOWERS + IMAGE_TOWERS:
        family = TEXT_TOWERS if class_name in TEXT_TOWERS else IMAGE_TOWERS
        written = (config.get("architectures") or [config.get("_class_name", class_name)])[0]
        if written not in (*family, "CLIPModel"):
            raise _wrong_class(name, (class_name,), written)
    elif (written := config.get("_class_name")) != class_name:
        raise _wrong_class(name, (class_name,), written)


def _wrong_class(name: str, wanted: tuple[str, ...], got: object) -> UserError:
    said = f"a Karras-compatible scheduler such as {wanted[0]}" if len(wanted) > 3 else " or ".join(wanted)
    return UserError(f"'{name}' must be {said}, got {got}")


def _check_values(file: str, class_name: str, config: dict[str, Any]) -> None:
    def refuse(where: str, wanted: str, got: object) -> None:
        raise UserError(f"{file}: {where} must be {wanted}, got {str(got)[:40]}")

    for key in MANDATORY.get(class_name, ()):
        if config.get(key) is None:
            refuse(key, "given", "nothing")
    if (
        class_name == "AutoencoderKL"
        and config.get("scaling_factor") is None
        and not is_older(config, FIRST_WITH_SCALING_FACTOR)
    ):
        refuse("scaling_factor", "> 0", "nothing")
    if config.get("quantization_config") is not None:
        refuse("quantization_config", "absent", "one; save the model without it")
    for key, value in config.items():
        for where, number in _numbers(file, key, value):
            if key in LARGEST and number is not None:
                if isinstance(number, bool) or not isinstance(number, int):
                    refuse(where, "a whole number", number)
                if number <= 0:
                    refuse(where, "> 0", number)
                if number > LARGEST[key]:
                    refuse(where, f"<= {LARGEST[key]}", number)
            if key in POSITIVE and number is not None:
                if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
                    refuse(where, "> 0", number)
                if not math.isfinite(number):
                    refuse(where, "finite", number)
        if value is not None and value not in CHOICES.get(key, (value,)):
            refuse(key, f"one of {', '.join(CHOICES[key])}", value)
    blocks = config.get("block_out_channels")
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if blocks is not None and key in config and not isinstance(config[key], list):
            refuse(key, "a list", config[key])
        if blocks is not None and key in config and not 0 < len(config[key]) == len(blocks):
            refuse(key, f"a list of {len(blocks) or 'some'}, like block_out_channels", f"{len(config[key])}")


def is_older(config: Mapping[str, Any], release: tuple[int, int]) -> bool:
    """Whether a component was saved by a Diffusers before this release, by what its configuration says."""
    numbers = str(config.get("_diffusers_version", "")).split(".")[:2]
    return all(part.isdigit() for part in numbers) and (0,) < tuple(map(int, numbers)) < release


def _numbers(file: str, where: str, value: object) -> Iterator[tuple[str, object]]:
    """A value and what it holds, however deep, each with its place."""
    if isinstance(value, list):
        if len(value) > LONGEST_LIST and where.partition("[")[0] in LARGEST:
            raise UserError(f"{file}: {where} must have at most {LONGEST_LIST} entries, got {len(value)}")
        for i, entry in enumerate(value):
            yield from _numbers(file, f"{where}[{i}]", entry)
    else:
        yield where, value
