"""open_clip's published models by name, as transformers' towers, tokenizer and image processor.

    export("ViT-H-14", "laion2b_s32b_b79k", folder)      a tag, of which open_clip knows the repository
    export("ViT-B-32", "weights.safetensors", folder)    a file of open_clip's own
    export("hf-hub:owner/repository", None, folder)      whose open_clip_config.json says what it is

What transformers' CLIP towers cannot hold is refused before anything is built, pickles before they are opened.
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from ldm import hub
from ldm.clip.export import save
from ldm.clip.tokenizer import clip_tokenizer
from ldm.components.configs import read_json
from ldm.components.weights import read_header
from ldm.errors import UserError
from ldm.files import expanded

HUB = "hf-hub:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
VOCABULARY = 49408
FREE = {"layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
        "context_length", "vocab_size", "output_tokens", "pad_id", "eos_id"}  # fmt: skip
"""Of a tower's configuration, what transformers has too, or what makes no difference to embeddings; anything else must
be as open_clip has it where it is left out."""
RESAMPLING = {"bicubic": 3, "bilinear": 2}  # PIL's numbers


@dataclass(frozen=True)
class Published:
    """What open_clip publishes of a model."""

    name: str
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    """As `open_clip.transform.PreprocessCfg`, but for the size."""
    weights: Path


def export(name: str, pretrained: str | None, folder: Path) -> None:
    """Writes text_encoder, image_encoder, tokenizer and image_processor into `folder`.

    Embeddings equal open_clip's within 1e-5; token ids those of its tokenizer for text that its cleaning (ftfy, HTML
    entities) leaves alone, past whose end ours repeats the end token, which the embedding does not see; pixels those of
    its transform within 1/255, but that where an odd number of rows is cut off it may leave one more at the top.

    Raises:
        UserError: there is no such model, it has no safetensors, or transformers has no such tower.
    """
    found = find(name, pretrained)
    model = load(found)
    tokenizer = clip_tokenizer(found.config["text_cfg"].get("context_length", 77))
    save(model, tokenizer, folder, _image_processor(model.visual.image_size[0], found.preprocessing))


def load(found: Published) -> open_clip.CLIP:
    """The model with its weights, in evaluation mode. Raises `UserError` as `export` does."""
    check_supported(found)
    config = found.config
    model = open_clip.CLIP(
        config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=config.get("quick_gelu", False)
    ).eval()
    _fill(model, found)
    return model


def find(name: str, pretrained: str | None) -> Published:
    """The configuration and the weights' file of a model, downloaded where they are not in the cache."""
    defaults = asdict(PreprocessCfg())
    if name.startswith(HUB):
        if pretrained is not None:
            raise UserError(f"--pretrained '{pretrained}': '{name}' brings its own weights; leave it out")
        folder = hub.fetch(name.removeprefix(HUB), [CONFIG, WEIGHTS])
        if not (folder / CONFIG).is_file():
            raise UserError(f"'{name}' has no {CONFIG}; name a repository of open_clip's models")
        config = read_json(folder / CONFIG)
        if not isinstance(config.get("model_cfg"), dict):
            raise UserError(f"'{name}': its {CONFIG} has no model_cfg; name a repository of open_clip's models")
        preprocessing = merge_preprocess_dict(defaults, config.get("preprocess_cfg", {}))
        return Published(name, config["model_cfg"], preprocessing, _weights(name, folder))
    config = open_clip.get_model_config(name)
    if config is None:
        nearest = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.3)
        did_you = nearest[0] if nearest else "ViT-B-32"
        raise UserError(f"model '{name}' is none of open_clip's; did you mean '{did_you}'?")
    if pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"'{name}' has no weights by itself; give --pretrained, a .safetensors file or a tag ({tags})")
    path = expanded(pretrained)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--pretrained '{pretrained}' is not safetensors: a pickle is not opened; convert it first")
        return Published(name, config, defaults, path)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"--pretrained '{pretrained}' is neither a file nor a tag of '{name}'; its tags: {tags}")
    if bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise UserError(f"the weights '{pretrained}' are not of '{name}', whose activation is another; name '{other}'")
    repository = "/".join(tag.get("hf_hub", "").split("/")[:2])
    if not repository:
        raise UserError(f"'{pretrained}' of '{name}' is published as a pickle alone, which is not opened; take another")
    folder = hub.fetch(repository, [CONFIG, WEIGHTS])
    return Published(name, config, merge_preprocess_dict(defaults, tag), _weights(repository, folder))


def check_supported(found: Published) -> None:
    """Raises `UserError` for towers that transformers' CLIP does not have."""

    def refuse(what: str) -> None:
        raise UserError(f"'{found.name}' cannot be exported: {what}; only CLIP's own vision and text transformers can")

    config, text, vision = found.config, found.config.get("text_cfg", {}), found.config.get("vision_cfg", {})
    if "multimodal_cfg" in config:
        refuse("it is a CoCa, with a decoder of text")
    if text.get("hf_model_name") or config.get("custom_text"):
        refuse(f"its text tower is {text.get('hf_model_name') or 'one of its own'} (custom_text)")
    if vision.get("timm_model_name"):
        refuse(f"its image tower is timm's {vision['timm_model_name']}")
    if not isinstance(vision.get("layers", 12), int):
        refuse("its image tower is a ResNet")
    if text.get("hf_tokenizer_name") or text.get("vocab_size", VOCABULARY) != VOCABULARY:
        refuse(f"its tokenizer is not CLIP's own ({text.get('hf_tokenizer_name') or text.get('vocab_size')})")
    for tower, kind, own in (("vision", open_clip.CLIPVisionCfg, vision), ("text", open_clip.CLIPTextCfg, text)):
        plain = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        for key, value in own.items():
            if key not in FREE and value != plain.get(key):
                refuse(f"{tower}_cfg.{key} is {value!r}")
        for key in ("image_size", "patch_size"):
            if not isinstance(own.get(key, 1), int):
                refuse(f"{tower}_cfg.{key} is {own[key]!r}, not square")
    resizing = found.preprocessing
    if resizing["resize_mode"] not in ("shortest", "squash") or resizing["interpolation"] not in RESAMPLING:
        refuse(f"its images are resized by '{resizing['resize_mode']}', '{resizing['interpolation']}'")


def _weights(name: str, folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"'{name}' has no {WEIGHTS}; a pickle is not opened: convert it, and give it by --pretrained")
    return folder / WEIGHTS


def _fill(model: open_clip.CLIP, found: Published) -> None:
    """Raises `UserError` where the file's weights are not the model's, by name, shape, or number."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    stored = {key: tensor.shape for key, tensor in read_header(found.weights).items()}
    stored = {key: shape for key, shape in stored.items() if key in expected or key != "logit_bias"}
    for key in sorted(expected.keys() | stored.keys()):
        if expected.get(key) != stored.get(key):
            raise UserError(
                f"'{found.weights}' is not of '{found.name}': {key} expects {expected.get(key, 'nothing')}, the file "
                f"has {stored.get(key, 'nothing')}"
            )
    tensors = load_file(found.weights)
    for key in expected:
        if not torch.isfinite(tensors[key]).all():
            raise UserError(f"'{found.weights}': '{key}' is not finite; download it again")
    model.load_state_dict({key: tensors[key] for key in expected})


def _image_processor(size: int, preprocessing: Mapping[str, Any]) -> CLIPImageProcessor:
    square = {"height": size, "width": size}
    is_squashed = preprocessing["resize_mode"] == "squash"
    return CLIPImageProcessor(
        size=square if is_squashed else {"shortest_edge": size},
        crop_size=square,
        resample=RESAMPLING[preprocessing["interpolation"]],
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
    )
