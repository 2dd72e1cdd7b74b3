"""Whether the weights of a component are those of its configuration: it is built without memory, on torch's meta
device, and its names and shapes are compared with what the headers of the files say. A few of them, which follow from
the configuration at once, are compared before torch is imported."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.components.configs import IMAGE_TOWERS, TEXT_TOWERS, read_config
from ldm.components.weights import Stored
from ldm.errors import UserError

MODULES = {
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl",
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition",
    "UNet2DModel": "diffusers.models.unets.unet_2d",
    "PriorTransformer": "diffusers.models.transformers.prior_transformer",
    "StableUnCLIPImageNormalizer": "diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer",
    **dict.fromkeys((*TEXT_TOWERS, *IMAGE_TOWERS), "transformers.models.clip.modeling_clip"),
}
OLDER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Of the autoencoder's attention, before Diffusers 0.12."""

Shapes = dict[str, tuple[int, ...]]


def check_outline(component: str, class_name: str, config: Mapping[str, Any], tensors: dict[str, Stored]) -> None:
    """Raises `UserError` at the first of the weights at a network's ends and levels that is not as it should be."""
    stored = {_plain(key): tensor.shape for key, tensor in tensors.items()}
    for key, shape in _outline(class_name, config).items():
        if None not in shape and stored.get(key) != shape:
            raise _disagreement(component, key, shape, stored.get(key))


def _outline(class_name: str, config: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Name -> shape of weights that the class always has; None for sizes that the configuration leaves to it."""
    get = config.get
    if class_name == "UNet2DConditionModel":
        blocks, kernel = get("block_out_channels"), (get("conv_in_kernel"),) * 2
        plain = ("DownBlock2D", "CrossAttnDownBlock2D")
        levels = {
            f"down_blocks.{i}.resnets.0.conv1.weight": (blocks[i], blocks[max(i - 1, 0)], 3, 3)
            for i, kind in enumerate(get("down_block_types") or ())
            if kind in plain
        }
        return {"conv_in.weight": (blocks[0], get("in_channels"), *kernel), **levels}
    if class_name == "AutoencoderKL":
        blocks = get("block_out_channels")
        return {
            "encoder.conv_in.weight": (blocks[0], get("in_channels"), 3, 3),
            "decoder.conv_in.weight": (blocks[-1], get("latent_channels"), 3, 3),
            "decoder.conv_out.weight": (get("out_channels"), blocks[0], 3, 3),
        }
    if class_name == "PriorTransformer":
        embedding = get("embedding_dim")
        return {
            "clip_mean": (1, get("clip_embed_dim") or embedding),
            "proj_in.weight": (_product(get("num_attention_heads"), get("attention_head_dim")), embedding),
        }
    if class_name in TEXT_TOWERS:
        width = get("hidden_size")
        return {
            "embeddings.token_embedding.weight": (get("vocab_size"), width),
            "embeddings.position_embedding.weight": (get("max_position_embeddings"), width),
        }
    if class_name == "StableUnCLIPImageNormalizer":
        return {"mean": (1, get("embedding_dim"))}
    return {}


def _product(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left * right


def check_shapes(folder: Path, class_name: str, tensors: dict[str, Stored]) -> None:
    """Raises `UserError` at the first weight that is not as the configuration asks; if there is none, at the first that
    is missing, or that nothing asks for."""
    expected = _expected(folder, class_name)
    stored = _stored(tensors, expected)
    for key in sorted(expected, key=lambda key: key not in stored):  # within each in the order of the network
        if stored.get(key) != expected[key]:
            raise _disagreement(folder.name, key, expected[key], stored.get(key))
    for key in sorted(set(stored) - set(expected)):
        raise _disagreement(folder.name, key, None, stored[key])


def _disagreement(component: str, key: str, expected: tuple | None, stored: tuple | None) -> UserError:
    def said(shape: tuple[int, ...] | None) -> str:
        return "nothing" if shape is None else f"({', '.join(map(str, shape))})"

    return UserError(
        f"{component}: config and weights disagree: {key} expects {said(expected)}, the file has {said(stored)}"
    )


def _expected(folder: Path, class_name: str) -> Shapes:
    """The names and shapes of the class's weights. Raises `UserError` where the configuration cannot be built."""
    import torch

    kind = getattr(importlib.import_module(MODULES[class_name]), class_name)
    config = read_config(folder, class_name)
    try:
        with torch.device("meta"):
            if class_name in TEXT_TOWERS + IMAGE_TOWERS:
                model = kind(kind.config_class.from_pretrained(str(folder), local_files_only=True))
            else:
                model = kind.from_config(config)
    except Exception as error:  # whatever the class makes of the values
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder.name}/config.json: no {class_name} can be built of it ({type(error).__name__}: {said})"
        ) from None
    return {_plain(key): tuple(value.shape) for key, value in model.state_dict().items()}


def _stored(tensors: dict[str, Stored], expected: Shapes) -> Shapes:
    """The same of the files, under today's names."""
    stored = {}
    for key, tensor in tensors.items():
        key = _plain(key)
        if key.endswith("embeddings.position_ids") and key not in expected:
            continue  # 0, 1, 2 …, which older releases of Transformers stored
        for older, newer in OLDER_NAMES.items():
            if key not in expected and key.replace(older, newer) in expected:
                key = key.replace(older, newer)
        stored[key] = tensor.shape
    return stored


def _plain(key: str) -> str:
    """Releases of Transformers differ in whether a tower's weights carry its name."""
    return key.removeprefix("text_model.").removeprefix("vision_model.")
