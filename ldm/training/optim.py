"""Optimiser, learning rate and exponential moving average, and their state as named tensors for a checkpoint."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from ldm.config import TrainingConfig
from ldm.errors import RunError


def adamw(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only: gains, biases and single vectors are not pulled to 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), eps=1e-8, fused=True)


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
    """Average of the weights with the warm-up min(decay, (1 + step) / (10 + step))."""
    return EMAModel(model.parameters(), decay=decay, foreach=True)


def ema_tensors(ema: EMAModel, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Averaged weights by parameter name."""
    return dict(zip((name for name, _ in model.named_parameters()), ema.shadow_params, strict=True))


def load_ema(ema: EMAModel, model: torch.nn.Module, tensors: dict[str, torch.Tensor], step: int) -> None:
    """Restores what `ema_tensors` gave, after `step` steps."""
    for name, shadow in ema_tensors(ema, model).items():
        shadow.copy_(tensors[name])
    ema.optimization_step = step


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as tensors named `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restores what `optimizer_tensors` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # in its memory layout, too: the fused update pairs them place by place
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def averaged(ema: EMAModel, model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` has the averaged weights."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train()


def check_finite(
    loss: torch.Tensor,
    gradient_norm: torch.Tensor,
    *,
    step: int,
    learning_rate: float,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Raises RunError, before the update, where the loss or the gradients' norm is not a finite number.

    With fp16's `scaler` an infinite norm is an overflow: the scaler skips the update and lowers its scale, and only a
    scale below 1 says that no scale helps.
    """
    faults = [(name, value) for name, value in (("loss", loss), ("gradient norm", gradient_norm))
              if not torch.isfinite(value)]  # fmt: skip
    if faults and faults[0][0] == "gradient norm" and scaler is not None and scaler.get_scale() >= 1:
        return
    for name, value in faults:
        raise RunError(
            f"step {step}: the {name} is {float(value)} at learning rate {learning_rate:.2e}; the last checkpoint "
            "is intact: resume it with a lower training.learning_rate or with training.precision=fp32"
        )
