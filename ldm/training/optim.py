"""Optimiser, learning rate and exponential moving average, and their state as named tensors for a checkpoint."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ldm.config import TrainingConfig
from ldm.errors import UserError
from ldm.training import muon, sharded
from ldm.training.checkpoint import Saved


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What training changes of a network, by name. All else is neither averaged nor kept in checkpoints."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that training leaves as they are, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.requires_grad}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of a network: its state without what is frozen."""
    left_out = frozen(model)
    return {name: value for name, value in model.state_dict().items() if name not in left_out}


def build(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and kernels only: gains, biases and single vectors are not pulled to 0.

    With training.optimizer=adamw_8bit bitsandbytes' (Dettmers et al. 2022), whose moments of large tensors take 8 bits;
    with muon, `muon.Muon` for the matrices in the network's blocks.

    Raises:
        UserError: bitsandbytes is wanted and not installed; or Muon is, and the network has nothing for it.
    """
    parameters = trained(model)
    matrices = muon.matrices(model) if config.optimizer == "muon" else {}
    others = [parameter for name, parameter in parameters.items() if name not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": config.learning_rate, "betas": tuple(config.betas), "eps": 1e-8}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    if config.optimizer == "muon":
        if not matrices:
            raise UserError(
                f"training.optimizer muon: {type(model).__name__} has no linear layers in its blocks; take adamw"
            )
        group = {"params": list(matrices.values()), "lr": config.learning_rate, "weight_decay": config.weight_decay}
        return muon.Muon(group, torch.optim.AdamW(groups, **settings, fused=True))
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("training.optimizer adamw_8bit: needs bitsandbytes; pip install bitsandbytes") from None
    return AdamW8bit(groups, **settings)


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Factor on the learning rate in step `step` (0 is the first): linear warm-up, then cosine to 0 or constant."""
    warmup = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.learning_rate_schedule == "constant":
        return warmup
    progress = max(step - config.warmup_steps, 0) / max(config.max_steps - config.warmup_steps, 1)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig) -> float:
    """Sets, and returns, the learning rate of step `step`: a function of the step alone, so resume needs no state."""
    rate = config.learning_rate * learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def moving_average(model: torch.nn.Module, decay: float) -> EMAModel:
    """Average of the trained weights with the warm-up min(decay, (1 + step) / (10 + step)). With decay 0 it is the
    weights themselves, not a copy."""
    ema = EMAModel(trained(model).values() if decay else [], decay=decay)
    if not decay:
        ema.shadow_params = [weight.detach() for weight in trained(model).values()]
    return ema


@torch.no_grad()
def update_average(ema: EMAModel, model: torch.nn.Module) -> None:
    """After a step: what EMAModel.step does, but in place, where that makes a copy of all weights first."""
    ema.optimization_step += 1
    ema.cur_decay_value = ema.get_decay(ema.optimization_step)
    update = get_ema_multi_avg_fn(ema.cur_decay_value)
    update(sharded.local(ema.shadow_params), sharded.local(trained(model).values()), None)


def ema_tensors(ema: EMAModel, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Averaged weights by parameter name."""
    return dict(zip(trained(model), ema.shadow_params, strict=True))


def load_ema(ema: EMAModel, model: torch.nn.Module, tensors: dict[str, torch.Tensor], updates: int) -> None:
    """Restores what `ema_tensors` gave, after so many calls of `update_average`."""
    for name, shadow in ema_tensors(ema, model).items():
        shadow.copy_(tensors[name])
    ema.optimization_step = updates


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as tensors named `<parameter number>.<name>`; names descend with dots where it is nested,
    as bitsandbytes' is. None of DeepSpeed's, which it writes only as pickles."""
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        return {}
    tensors: dict[str, torch.Tensor] = {}

    def collect(prefix: str, values: dict[Any, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(f"{prefix}{name}.", value)
            else:
                tensors[f"{prefix}{name}"] = torch.tensor(value) if isinstance(value, int) else value

    collect("", optimizer.state_dict()["state"])
    return tensors


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores what `optimizer_tensors` gave."""
    parameters = _parameters(optimizer)
    state: dict[Any, Any] = {}
    for key, value in tensors.items():
        first, *names, last = key.split(".")
        number = int(first)
        if value.shape == parameters[number].shape:  # in its memory layout, too: the fused update pairs them by place
            value = torch.empty_like(parameters[number], dtype=value.dtype, requires_grad=False).copy_(value)
        place = state.setdefault(number, {})
        for name in names:
            place = place.setdefault(name, {})
        place[last] = value.item() if value.dtype == torch.int64 else value  # counts, which were no tensors
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(saved: Saved, group: str, model: torch.nn.Module) -> None:
    """Restores what `weights` gave. Raises UserError where they are another network's."""
    try:
        model.load_state_dict(frozen(model) | saved.read(group, model.state_dict().get))
    except RuntimeError as error:
        _, *differences = str(error).splitlines()
        raise UserError(
            f"--resume {saved.path}: its {group} is another network than is configured now "
            f"({(differences or [error])[0]!s:.150}); give what resume.allow names as it was"
        ) from None


def restore(saved: Saved, model: torch.nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights, averages and optimiser back as the groups `model`, `ema` and `optimizer` of `saved` have them.
    Raises UserError where they do not fit."""
    load_weights(saved, "model", model)
    parameters = _parameters(optimizer)
    tensors = saved.read("optimizer", lambda name: parameters[int(name.split(".")[0])])
    if not tensors or isinstance(optimizer, DeepSpeedOptimizerWrapper):
        raise UserError(
            f"--resume {saved.path}: DeepSpeed keeps the state of its optimiser to itself, so that its runs cannot go "
            "on where they stopped; train with configs/accelerate/fsdp2.yaml"
        )
    load_ema(ema, model, saved.read("ema", ema_tensors(ema, model).get), saved.updates)
    load_optimizer(optimizer, tensors)


def clip_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, model: torch.nn.Module, largest_norm: float
) -> torch.Tensor:
    """`accelerator.clip_grad_norm_` where a run has two optimisers, of which that would, under fp16, unscale both: also
    what the other one's gradients have accumulated so far."""
    accelerator.unscale_gradients(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)


@contextmanager
def averaged(ema: EMAModel, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, `model` has the averaged weights. Gives a network with them that the main process can call alone."""
    now, averages = sharded.local(trained(model).values()), sharded.local(ema.shadow_params)
    kept = [weight.to("cpu", copy=True) for weight in now]
    torch._foreach_copy_(now, averages)
    model.eval()
    try:
        yield sharded.whole(model)
    finally:
        torch._foreach_copy_(now, kept)
        model.train()
