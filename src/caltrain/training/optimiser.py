"""SGD and the learning-rate schedule, the same in every zone and in the plain loop."""

from __future__ import annotations

import math

import torch
from torch import nn

from caltrain.training.spec import TrainingSpec


def optimiser(module: nn.Module, spec: TrainingSpec) -> torch.optim.SGD:
    """SGD over the module's parameters; its rate is set before each step by `set_rate`."""
    return torch.optim.SGD(
        module.parameters(), lr=spec.learning_rate, momentum=spec.momentum, weight_decay=spec.weight_decay
    )


def rate_at(spec: TrainingSpec, *, epoch: int, step: int, steps: int) -> float:
    """Learning rate of `step` (of `steps`) in `epoch`: linear warm-up, then constant or cosine to zero."""
    progress = epoch + step / steps
    if progress < spec.warmup_epochs:
        return spec.learning_rate * (progress + 1 / steps) / spec.warmup_epochs
    if spec.schedule == "constant":
        return spec.learning_rate
    share = (progress - spec.warmup_epochs) / max(spec.epochs - spec.warmup_epochs, 1)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def set_rate(sgd: torch.optim.SGD, rate: float) -> None:
    """Set the rate of the coming step."""
    for group in sgd.param_groups:
        group["lr"] = rate
