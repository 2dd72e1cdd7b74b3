"""open_clip's model as transformers' two towers with the same embeddings, and back; both on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ldm.clip.model import build
from ldm.clip.parts import ClipParts
from ldm.components.configs import read_json
from ldm.errors import UserError
from ldm.files import make_readable


@dataclass(frozen=True)
class ClipTowers:
    """A trained CLIP as transformers has it."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection | None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Of pixels in [0, 1], as the image tower reads them: (u - mean) / std."""

    def image_embeds(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of any size -> (B, D)."""
        return self.image_encoder(pixel_values=self.pixel_values(images)).image_embeds

    def pixel_values(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what the image tower reads, of its own size."""
        size = self.image_encoder.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        if not self.reads_plain_pixels:
            mean, std = (images.new_tensor(x)[:, None, None] for x in (self.image_mean, self.image_std))
            images = ((images + 1) / 2 - mean) / std
        return images

    @property
    def reads_plain_pixels(self) -> bool:
        """Whether it reads [-1, 1], as those that `train_clip.py` trains."""
        return {*self.image_mean, *self.image_std} == {0.5}


BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Names inside a transformer block: open_clip's → transformers'."""


def to_transformers(
    model: open_clip.CLIP, tokenizer: CLIPTokenizer
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """The text and the image tower, in evaluation mode, in fp32 on the CPU; embeddings equal within 1e-5."""
    state = {key: value.detach().float().cpu() for key, value in model.state_dict().items()}
    vision = model.visual.transformer
    text_encoder = CLIPTextModelWithProjection(text_config(model, tokenizer))
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.resblocks[0].mlp.c_fc.out_features,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.resblocks[0].attn.num_heads,
            image_size=model.visual.image_size[0],
            patch_size=model.visual.patch_size[0],
            projection_dim=model.visual.proj.shape[1],
            hidden_act=_activation(model.visual),
        )
    )
    text_encoder.load_state_dict(
        {
            "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
            "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
            **_blocks(state, "transformer.resblocks", "text_model.encoder.layers", model.transformer.layers),
            **_layer_norm(state, "ln_final", "text_model.final_layer_norm"),
            "text_projection.weight": state["text_projection"].T.contiguous(),
        }
    )
    image_encoder.load_state_dict(
        {
            "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
            "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
            "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
            **_layer_norm(state, "visual.ln_pre", "vision_model.pre_layrnorm"),
            **_blocks(state, "visual.transformer.resblocks", "vision_model.encoder.layers", vision.layers),
            **_layer_norm(state, "visual.ln_post", "vision_model.post_layernorm"),
            "visual_projection.weight": state["visual.proj"].T.contiguous(),
        }
    )
    return text_encoder.eval(), image_encoder.eval()


def text_config(model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """transformers' configuration of the text tower."""
    block = model.transformer.resblocks[0]
    return CLIPTextConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.transformer.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=model.transformer.layers,
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=model.context_length,
        projection_dim=model.text_projection.shape[1],
        hidden_act=_activation(model),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def arguments_of(text: CLIPTextConfig, vision: CLIPVisionConfig) -> dict[str, Any]:
    """Of `build`, for the model whose towers have these configurations."""
    return {
        "embedding_dim": text.projection_dim,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_width": vision.hidden_size,
        "vision_layers": vision.num_hidden_layers,
        "vision_heads": vision.num_attention_heads,
        "text_width": text.hidden_size,
        "text_layers": text.num_hidden_layers,
        "text_heads": text.num_attention_heads,
        "vocabulary_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "text_mlp_ratio": text.intermediate_size / text.hidden_size,
    }


def from_transformers(
    text_encoder: CLIPTextModelWithProjection, image_encoder: CLIPVisionModelWithProjection
) -> open_clip.CLIP:
    """The towers as one open_clip model, to train on; its temperature begins afresh.

    Raises:
        UserError: an activation other than GELU.
    """
    for name, encoder in (("text_encoder", text_encoder), ("image_encoder", image_encoder)):
        if encoder.config.hidden_act != "gelu":
            activation = encoder.config.hidden_act
            raise UserError(f"init: {name} has activation {activation!r}; only 'gelu' can be trained further")
    sizes = arguments_of(text_encoder.config, image_encoder.config)
    ratios = {  # open_clip cuts their product with the width to a whole number
        name: (config.intermediate_size + 0.5) / config.hidden_size
        for name, config in (("mlp_ratio", image_encoder.config), ("text_mlp_ratio", text_encoder.config))
    }
    model = build(**sizes | ratios)
    state = {**text_encoder.state_dict(), **image_encoder.state_dict()}
    model.load_state_dict(
        {
            "logit_scale": model.logit_scale.detach(),
            "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
            "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
            **_open_blocks(state, "text_model.encoder.layers", "transformer.resblocks", sizes["text_layers"]),
            **_layer_norm(state, "text_model.final_layer_norm", "ln_final"),
            "text_projection": state["text_projection.weight"].T,
            "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
            "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
            "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
            **_layer_norm(state, "vision_model.pre_layrnorm", "visual.ln_pre"),
            **_open_blocks(
                state, "vision_model.encoder.layers", "visual.transformer.resblocks", sizes["vision_layers"]
            ),
            **_layer_norm(state, "vision_model.post_layernorm", "visual.ln_post"),
            "visual.proj": state["visual_projection.weight"].T,
        }
    )
    return model


def image_processor(image_size: int) -> CLIPImageProcessor:
    """From any picture to (3, image_size, image_size) in [-1, 1], what every network here sees."""
    return CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save(
    model: open_clip.CLIP, tokenizer: CLIPTokenizer, folder: Path, processor: CLIPImageProcessor | None = None
) -> None:
    """Writes text_encoder, image_encoder, tokenizer and image_processor, `image_processor` if None, into `folder`."""
    text_encoder, image_encoder = to_transformers(model, tokenizer)
    text_encoder.save_pretrained(folder / "text_encoder")
    image_encoder.save_pretrained(folder / "image_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    (processor or image_processor(image_encoder.config.image_size)).save_pretrained(folder / "image_processor")
    for file in folder.rglob("*.safetensors"):
        make_readable(file)


def load(parts: ClipParts) -> ClipTowers:
    """Towers and tokenizer, frozen and in evaluation mode, whatever the weights are stored in.

    Raises:
        UserError: weights do not fill a tower exactly.
    """
    pixels = {}
    if parts.image_processor is not None:
        written = read_json(parts.image_processor / "preprocessor_config.json")
        pixels = {name: tuple(written[name]) for name in ("image_mean", "image_std") if written.get(name)}
    return ClipTowers(
        CLIPTokenizer.from_pretrained(parts.tokenizer),
        _frozen(CLIPTextModelWithProjection, parts.text_encoder),
        None if parts.image_encoder is None else _frozen(CLIPVisionModelWithProjection, parts.image_encoder),
        **pixels,
    )


def text_tower(source: CLIPTextModelWithProjection) -> CLIPTextModel:
    """The same tower without its projection, as the U-Net's text encoder: other prefix, same weights."""
    tower = CLIPTextModel(source.config).eval()
    state = {key.removeprefix("text_model."): value for key, value in source.state_dict().items()}
    state.pop("text_projection.weight")
    prefix = "text_model." if any(key.startswith("text_model.") for key in tower.state_dict()) else ""
    tower.load_state_dict({f"{prefix}{key}": value for key, value in state.items()})
    return tower


def _frozen(kind: type, folder: Path):
    model, report = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            first = sorted(map(str, report[fault]))[0]
            raise UserError(
                f"'{folder}': config and weights disagree, {fault.replace('_', ' ')}: {first}; write it again"
            )
    return model.eval().requires_grad_(False)


def _activation(tower: torch.nn.Module) -> str:
    """transformers' name of what a tower's blocks have between their two layers."""
    return "quick_gelu" if isinstance(tower.transformer.resblocks[0].mlp.gelu, QuickGELU) else "gelu"


def _layer_norm(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.{name}": state[f"{source}.{name}"] for name in ("weight", "bias")}


def _blocks(state: dict[str, Tensor], source: str, target: str, layers: int) -> dict[str, Tensor]:
    """open_clip keeps query, key and value in one matrix, transformers in three."""
    blocks = {}
    for layer in range(layers):
        for name in ("weight", "bias"):
            for ours, theirs in BLOCK.items():
                blocks[f"{target}.{layer}.{theirs}.{name}"] = state[f"{source}.{layer}.{ours}.{name}"]
            rows = state[f"{source}.{layer}.attn.in_proj_{name}"].chunk(3)
            for letter, row in zip("qkv", rows, strict=True):
                blocks[f"{target}.{layer}.self_attn.{letter}_proj.{name}"] = row.clone()
    return blocks


def _open_blocks(state: dict[str, Tensor], source: str, target: str, layers: int) -> dict[str, Tensor]:
    blocks = {}
    for layer in range(layers):
        for name in ("weight", "bias"):
            for ours, theirs in BLOCK.items():
                blocks[f"{target}.{layer}.{ours}.{name}"] = state[f"{source}.{layer}.{theirs}.{name}"]
            blocks[f"{target}.{layer}.attn.in_proj_{name}"] = torch.cat(
                [state[f"{source}.{layer}.self_attn.{letter}_proj.{name}"] for letter in "qkv"]
            )
    return blocks
