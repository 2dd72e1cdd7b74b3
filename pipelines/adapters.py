"""Adapters (LoRA) in the pipelines that draw: Diffusers' own, behind a check of what is opened."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.utils.constants import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from ldm import hub
from ldm.errors import UserError
from pipelines.checks import check_number

METADATA = "lora_adapter_metadata"
DOWNLOAD_OPTIONS = (*hub.DOWNLOAD_OPTIONS, "revision", "weight_name")
INITIAL = (True, False, None, "gaussian")
"""Of the ways in which PEFT may begin an adapter, those that leave the model's own weights as they are."""


class TakesAdapters(StableDiffusionLoraLoaderMixin):
    """`load_lora_weights`, `set_adapters`, `fuse_lora`, `unfuse_lora` and `unload_lora_weights` of a pipeline's U-Net
    and text encoder, as stock pipelines have them."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs,
    ) -> None:
        """Adds the adapters of a run of train_ldm.py, a safetensors file, a folder or a repository of the Hub, or those
        given as tensors by name. Kohya's format is read, too.

        `weight_name`: of the file, where there are several. `adapter_name`: for `set_adapters`. Further keyword
        arguments are the Hub's `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, and stock's.
        Raises `UserError` for what cannot be used, before the pipeline is changed.
        """
        if not USE_PEFT_BACKEND:
            raise UserError("adapters need PEFT: pip install peft")
        source, options = pretrained_model_name_or_path_or_dict, {"adapter_name": adapter_name, **kwargs}
        if not options.pop("use_safetensors", True):
            raise UserError("use_safetensors must be True: pickles are not opened; convert them to safetensors")
        if not isinstance(source, dict):
            given = {name: options.pop(name) for name in DOWNLOAD_OPTIONS if name in options}
            path = hub.resolve_adapters(source, **given)
            check_metadata(path)
            source = str(path.parent)
            options |= {"weight_name": path.name, "use_safetensors": True}
        subject = "adapters" if isinstance(source, dict) else options["weight_name"]
        stored = {name: options[name] for name in ("weight_name", "use_safetensors") if name in options}
        state, _ = self.lora_state_dict(source, unet_config=self.unet.config, **stored)
        check_adapters(subject, state, {"unet": self.unet, "text_encoder": self.text_encoder})
        super().load_lora_weights(source, **options)

    def save_pretrained(self, *args, **kwargs) -> None:
        if names := sorted({name for names in self._adapters().values() for name in names}):
            raise UserError(
                f"adapters {', '.join(names)} are loaded, which a pipeline's folder does not hold; make them part of "
                "the weights with fuse_lora(), then unload_lora_weights(), or unload them"
            )
        super().save_pretrained(*args, **kwargs)

    def _adapters(self) -> dict[str, list[str]]:
        """Names of the loaded adapters by component; none where PEFT, and so any adapter, is absent."""
        models = {name: getattr(self, name) for name in self._lora_loadable_modules}
        return {name: list(model.peft_config) for name, model in models.items() if hasattr(model, "peft_config")}

    @contextmanager
    def _text_encoder_scaled(self, cross_attention_kwargs: dict[str, Any] | None) -> Iterator[None]:
        """Inside, the text encoder's adapters count by the `scale` that is given to the U-Net's."""
        scale = check_number("cross_attention_kwargs['scale']", (cross_attention_kwargs or {}).get("scale", 1.0))
        if "text_encoder" not in self._adapters():
            yield
            return
        scale_lora_layers(self.text_encoder, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self.text_encoder, scale)


def check_metadata(path: Path) -> None:
    """Raises `UserError` for metadata that scale adapters by what is no number, or would change the weights beside."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return
    try:
        entries = {name.rpartition(".")[::2]: value for name, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{path.name}: its {METADATA} cannot be read; save the adapters again") from None
    for (_, name), value in entries.items():
        alphas = value.values() if name == "alpha_pattern" and isinstance(value, dict) else [value]
        if name in ("lora_alpha", "alpha_pattern") and not all(_is_finite(alpha) for alpha in alphas):
            raise UserError(f"{path.name}: {name} must be a finite number, got {str(value)[:40]}")
        if name == "init_lora_weights" and value not in INITIAL:
            raise UserError(f"{path.name}: {name} {str(value)[:40]!r} changes the model's own weights; save it without")


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_adapters(subject: str, state: dict[str, Tensor], models: dict[str, nn.Module]) -> None:
    """Raises `UserError` unless every tensor is of an adapter for a layer of `models`, finite and of its shape."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in models}
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        if component not in parts or "lora" not in rest:
            raise UserError(f"{subject}: '{key}' is no adapter of {' or '.join(parts)}, which alone take them here")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{subject}: '{key}' is not finite, which draws nothing; download or train it again")
        parts[component][rest] = tensor
    for component, tensors in parts.items():
        if not tensors:
            continue
        try:
            stored = _in_pefts_names(component, tensors, models[component])
        except ValueError:
            raise UserError(f"{subject}: '{next(iter(tensors))}' is a name of no known kind of adapters") from None
        for layer in dict.fromkeys(key.rpartition(".lora_")[0] for key in stored):
            expected = _expected(models[component], layer, stored)
            found = {key: tuple(tensor.shape) for key, tensor in stored.items() if key.startswith(f"{layer}.lora_")}
            for key in expected | found:
                if expected.get(key) != found.get(key):
                    raise UserError(
                        f"{subject}: model and adapters disagree: {component}.{key} expects {_said(expected.get(key))}"
                        f", the file has {_said(found.get(key))}"
                    )


def _in_pefts_names(component: str, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors by the names <layer>.lora_A.weight and <layer>.lora_B.weight, as the loader makes them."""
    if component == "text_encoder":
        tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
        return (
            tensors if hasattr(model, "text_model") else {k.removeprefix("text_model."): v for k, v in tensors.items()}
        )
    return tensors if "lora_A" in next(iter(tensors)) else convert_unet_state_dict_to_peft(tensors)


def _expected(model: nn.Module, layer: str, stored: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's two matrices, of the rank of those stored; {} where there is no such layer."""
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        return {}
    module = getattr(module, "base_layer", module)  # where there are adapters already
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return {}
    out, *read = module.weight.shape
    down, up = (f"{layer}.lora_{matrix}.weight" for matrix in "AB")
    ranks = [stored[name].shape[i] for i, name in enumerate((down, up)) if name in stored and stored[name].ndim > i]
    rank = ranks[0] if ranks else 1
    return {down: (rank, *read), up: (out, rank, *(1 for _ in read[1:]))}


def _said(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"({', '.join(map(str, shape))})"
