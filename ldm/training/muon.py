"""Muon beside AdamW, as one optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights, by name, of linear layers in the repeated blocks of a network. Embeddings,
    first and last layers are not among them: those do better with AdamW (Jordan et al. 2024)."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and any(map(str.isdigit, name.split(".")))
    }


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") for the first
    group of parameters, all matrices, and another optimiser for its own.

    Updates of matrices are scaled to the size that AdamW's have, so that both take one learning rate and one weight
    decay (Liu et al. 2025, "Muon is Scalable for LLM Training", §2.2).
    """

    def __init__(self, group: dict[str, Any], other: torch.optim.Optimizer):
        self.first, self.other = torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw"), other
        super().__init__([*self.first.param_groups, *other.param_groups], defaults={})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Both take a step with the groups and the state of this one, which may have been loaded since."""
        loss = None if closure is None else closure()
        for part, groups in ((self.first, self.param_groups[:1]), (self.other, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss
