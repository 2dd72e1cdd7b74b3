"""Whether the components of one pipeline are of each other's sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.components.configs import read_json
from ldm.errors import UserError

Configs = Mapping[str, Mapping[str, Any]]


def check_fit(configs: Configs) -> None:
    """Raises `UserError` at the first size that is not that of another component. `configs`: component ->
    configuration, of which any may be absent."""

    def fits(component: str, key: str, got: object, allowed: tuple, of: str) -> None:
        if got not in allowed and None not in allowed:
            said = " or ".join(map(str, allowed))
            raise UserError(f"{component}/config.json: {key} must be {said} ({of}), got {got}")

    unet, text, vae, prior = (configs.get(name) for name in ("unet", "text_encoder", "vae", "prior"))
    normalizer = configs.get("image_normalizer")
    if unet and vae:
        latents = vae.get("latent_channels")
        twice = None if latents is None else 2 * latents
        # 2L: conditioned on an image's latents; 2L + 1: and on a mask. Predictions may come with their variance.
        fits("unet", "in_channels", unet.get("in_channels"), (latents, twice, twice and twice + 1),
             "the latent_channels of vae, twice them, or that and one more")  # fmt: skip
        fits("unet", "out_channels", unet.get("out_channels", latents), (latents, twice),
             "the latent_channels of vae, or twice them")  # fmt: skip
    if unet and text:
        key = "cross_attention_dim" if unet.get("encoder_hid_dim") is None else "encoder_hid_dim"
        widths = unet.get(key)
        for width in widths if isinstance(widths, list) else [widths]:
            fits("unet", key, width, (text.get("hidden_size"),), "the hidden_size of text_encoder")
    if unet and normalizer and unet.get("class_embed_type") == "projection":
        fits("unet", "projection_class_embeddings_input_dim", unet.get("projection_class_embeddings_input_dim"),
             (2 * normalizer["embedding_dim"],), "twice the embedding_dim of image_normalizer")  # fmt: skip
    if prior:
        owner = "prior_text_encoder" if "prior_text_encoder" in configs else "text_encoder"
        _check_prior(fits, prior, configs.get(owner), owner, normalizer)


def _check_prior(fits, prior: Mapping, text: Mapping | None, owner: str, normalizer: Mapping | None) -> None:
    width = prior.get("embedding_dim")
    if text:
        fits("prior", "embedding_dim", width, (text.get("hidden_size"),), f"the hidden_size of {owner}")
        fits("prior", "embedding_proj_dim", prior.get("embedding_proj_dim") or width, (text.get("projection_dim"),),
             f"the projection_dim of {owner}")  # fmt: skip
        fits("prior", "num_embeddings", prior.get("num_embeddings"), (text.get("max_position_embeddings"),),
             f"the max_position_embeddings of {owner}")  # fmt: skip
    if normalizer:
        fits("prior", "clip_embed_dim", prior.get("clip_embed_dim") or width, (normalizer["embedding_dim"],),
             "the embedding_dim of image_normalizer")  # fmt: skip


def check_tokenizer(folder: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises `UserError` where a tokenizer gives more tokens, or other ones, than its text tower reads."""
    length, longest = config.get("model_max_length"), text.get("max_position_embeddings")
    if longest is not None and (not isinstance(length, int) or not 2 < length <= longest):
        raise UserError(
            f"{folder.name}/tokenizer_config.json: model_max_length must be from 3 to {longest} "
            f"(the tower's max_position_embeddings), got {length}"
        )
    vocabulary = _vocabulary(folder)
    largest = max((number for number in vocabulary.values() if isinstance(number, int)), default=-1)
    known = text.get("vocab_size")
    if largest < 0 or (known is not None and largest >= known):
        raise UserError(f"'{folder.name}' must have ids below {known} (the tower's vocab_size), got {largest}")


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id."""
    if not (folder / "tokenizer.json").is_file():
        return read_json(folder / "vocab.json")
    content = read_json(folder / "tokenizer.json")
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary if isinstance(vocabulary, dict) else {}
