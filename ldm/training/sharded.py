"""Weights, averages and optimiser states divided among processes (FSDP2), and how they are kept on disk.

Accelerate divides them, where it is launched with configs/accelerate/fsdp2.yaml; with deepspeed_zero2.yaml it leaves
weights and averages whole, and DeepSpeed alone knows the optimiser's state. Divided tensors are written by
torch.distributed.checkpoint, every process its own shard, as safetensors whose headers say what part of which tensor
is where: no other metadata, no pickle. Read back, they are divided anew among as many processes as there are.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_deepspeed_available
from torch import distributed, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.config import TrainingConfig
from ldm.errors import UserError

Tensors = Mapping[str, torch.Tensor]
Like = Callable[[str], torch.Tensor | None]


def check(training: TrainingConfig, can_shard: bool, on_cpu: bool) -> None:
    """Raises UserError where the launcher asked for FSDP or DeepSpeed and the script, whose weights they are, does not
    know them (`can_shard`), nor does its optimiser, or they cannot be had."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if (_wants_fsdp() or _wants_deepspeed()) and several and not can_shard:
        raise UserError(
            "FSDP and DeepSpeed are for the U-Net of train_ldm.py; its adapters (lora) and the networks of the other "
            "stages fit on every GPU: launch them with configs/accelerate/eight_gpus.yaml"
        )
    if (_wants_fsdp() or _wants_deepspeed()) and training.optimizer == "muon":
        raise UserError("training.optimizer muon: needs whole matrices, which FSDP and DeepSpeed divide; take adamw")
    if _wants_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_version 1: only FSDP2 is known here; launch with configs/accelerate/fsdp2.yaml")
    if _wants_deepspeed() and on_cpu:
        raise UserError("DeepSpeed: Accelerate starts it on accelerators only; launch without it")
    if _wants_deepspeed() and not is_deepspeed_available():
        raise UserError("DeepSpeed is not installed: pip install deepspeed, or launch without it")


def plugin() -> FullyShardedDataParallelPlugin | None:
    """Accelerate's plugin, where the launcher asked for FSDP. Weights are gathered in fp32 and autocast as under DDP,
    so that the arithmetic is the same."""
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy()) if _wants_fsdp() else None


def divide_on_cpu(accelerator: Accelerator) -> None:
    """Has Accelerate divide weights among processes on CPUs, too: torch can, and Accelerate does not ask it."""
    if _wants_fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin()


def mixed_precision(wanted: str) -> str:
    """What Accelerate is told of the run's precision (`no`, `bf16`, `fp16`). DeepSpeed would keep the weights in it, so
    it is told none: they stay in fp32, and `prepare` autocasts."""
    if not _wants_deepspeed():
        return wanted
    if wanted == "fp16":
        raise UserError("training.precision fp16: not with DeepSpeed; set it to bf16 or fp32")
    return "no"


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    precision: str,
    micro_batch_size: int,
    max_grad_norm: float,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`, in `precision` where Accelerate leaves autocast out.

    FSDP2 would stop where the configuration names blocks (that are gathered one at a time) of which this network has
    none; DeepSpeed clips gradients by itself, and wants to know how many samples a process sees at once.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        model.to(memory_format=torch.contiguous_format)  # all that can be divided
    if kind == DistributedType.FSDP:
        settings = accelerator.state.fsdp_plugin
        wanted = settings.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or []
        there = {type(module).__name__ for module in model.modules()}
        settings.transformer_cls_names_to_wrap = [name for name in wanted if name in there]
    elif kind == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings |= {"train_micro_batch_size_per_gpu": micro_batch_size, "gradient_clipping": max_grad_norm}
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and precision != "no":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)
    return prepared, optimizer


def _wants_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _wants_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every process; all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's part of each tensor, detached; it shares the tensor's memory."""
    return [tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors]


def whole(model: nn.Module) -> nn.Module:
    """A network that one process can call alone: `model` itself, or on the main process a copy of all of its weights
    where they are divided; all processes take part. A Diffusers model."""
    if not isinstance(model, FSDPModule):
        return model
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if distributed.get_rank() != 0:
        return model
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with init_empty_weights():
        copy = kind.from_config(model.config)
    copy.load_state_dict(state, assign=True)
    return copy.to(model.device).eval()


def write(folder: Path, tensors: Mapping[str, Tensors]) -> list[Path]:
    """Every process writes its part of all groups of `tensors` to `folder`, all of them at once. Returns this
    process's files, which are on disk."""
    named = {f"{group}/{name}": value for group, values in tensors.items() for name, value in values.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    distributed_checkpoint.save(named, storage_writer=writer)
    return sorted(folder.glob(f"shard-{distributed.get_rank() + 1:05d}-*.safetensors"))


def is_written(folder: Path) -> bool:
    """Whether `write` wrote the tensors of a checkpoint folder."""
    return any(folder.glob("shard-*.safetensors"))


def read(folder: Path, group: str, like: Like) -> dict[str, torch.Tensor]:
    """A group of tensors that `write` wrote, each divided as what `like` gives for its name is, else whole.

    Raises:
        FileNotFoundError: it wrote no such group.
    """
    reader = HuggingFaceStorageReader(str(folder))
    found = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        name = key.removeprefix(f"{group}/")
        if name == key:
            continue
        model = like(name)
        if isinstance(model, DTensor) and model.shape == entry.size:
            found[key] = torch.empty_like(model, dtype=entry.properties.dtype, requires_grad=False)
        else:
            found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    if not found:
        raise FileNotFoundError(group)
    distributed_checkpoint.load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{group}/"): value for key, value in found.items()}


def divided(tensors: Tensors, like: Like) -> dict[str, torch.Tensor]:
    """Whole tensors, the same on every process, each divided as what `like` gives for its name is."""
    return {name: _divided(value, like(name)) for name, value in tensors.items()}


def _divided(value: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(like, DTensor) or like.shape != value.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
