"""Which arithmetic a run uses, and how a network is prepared to use it fast."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from ldm.training import norms


def resolve(precision: str) -> str:
    """Accelerate's name (`no`, `bf16`, `fp16`) of a configured precision; `auto` looks at the hardware."""
    if precision != "auto":
        return {"fp32": "no"}.get(precision, precision)
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # as Accelerator will ask for it
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "no"


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has matrix or vector instructions for bf16 (AMX, AVX-512 BF16)."""
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and any(flag in cpu.read_text().split() for flag in ("amx_bf16", "avx512_bf16"))


def prepare(model: nn.Module, mixed_precision: str, device: torch.device) -> None:
    """Makes bf16 autocast fast on CPUs: norms of our own, attention as two explicit matrix products (the fused kernel's
    backward pass is 6× slower). Elsewhere autocast does the right thing itself.
    """
    if device.type != "cpu" or mixed_precision != "bf16":
        return
    norms.make_lean(model)
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, AttnProcessor2_0):
            module.set_processor(AttnProcessor())
        elif isinstance(module, nn.MultiheadAttention):  # open_clip's, which asks torch to choose
            torch.backends.cuda.enable_flash_sdp(False)  # for the whole process; the switch for CPUs, too


def finest(device: torch.device) -> torch.dtype:
    """Of a noise schedule, where a network is trained: float64, which Apple's GPUs alone do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def with_tokens_cast(conditions: dict[str, Any], mixed_precision: str) -> dict[str, Any]:
    """Arguments of a U-Net whose caption tokens have the type that autocast gives them: cast, and kept for the backward
    pass, once rather than in every layer of attention."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    if dtype is None or "encoder_hidden_states" not in conditions:
        return conditions
    return {**conditions, "encoder_hidden_states": conditions["encoder_hidden_states"].to(dtype)}
