"""SGD, clipping and the learning-rate schedule, the same in every zone and in the plain loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from caltrain.training.spec import TrainingSpec


def rate_at(spec: TrainingSpec, *, epoch: int, step: int, steps: int) -> float:
    """Learning rate of `step` (of `steps`) in `epoch`: linear warm-up or burn-in, then the schedule.

    Burn-in and `poly` are those of Darknet's `get_current_rate`. It counts a batch as seen before it steps, so steps
    count from 1: the first has 1 / burn_in of the way behind it, and step `max_steps` and all after it a rate of 0.
    """
    number = epoch * steps + step + 1
    if number < spec.burn_in:
        return spec.learning_rate * math.pow(number / spec.burn_in, spec.power)
    progress = epoch + step / steps
    if progress < spec.warmup_epochs:
        return spec.learning_rate * (progress + 1 / steps) / spec.warmup_epochs
    match spec.schedule:
        case "constant":
            return spec.learning_rate
        case "poly":
            total = spec.max_steps or spec.epochs * steps
            return spec.learning_rate * math.pow(max(0.0, 1 - number / total), spec.power)
        case "cosine":
            share = (progress - spec.warmup_epochs) / max(spec.epochs - spec.warmup_epochs, 1)
            return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class Descent:
    """SGD over the parameters of one zone. A zone without weights has nothing to do."""

    def __init__(self, module: nn.Module, spec: TrainingSpec) -> None:
        self._module, self._spec = module, spec
        self.parameters = dict(module.named_parameters())
        self.sgd = (
            torch.optim.SGD(
                self.parameters.values(),
                lr=spec.learning_rate,
                momentum=spec.momentum,
                weight_decay=spec.weight_decay,
            )
            if self.parameters
            else None
        )

    def clear(self) -> None:
        """Forget the gradients."""
        if self.sgd is not None:
            self.sgd.zero_grad(set_to_none=True)

    def momentum(self, parameter: nn.Parameter) -> Tensor | None:
        """What the optimiser remembers of a parameter; None before its first step."""
        held: Tensor | None = self.sgd.state[parameter].get("momentum_buffer") if self.sgd is not None else None
        return held

    def remember(self, parameter: nn.Parameter, momentum: Tensor) -> None:
        """Restore what was remembered, in the parameter's memory layout."""
        if self.sgd is not None:
            self.sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)

    def forget(self) -> None:
        """Be as before the first step."""
        if self.sgd is not None:
            self.sgd.state.clear()

    def step(self, epoch: int, step: int, steps: int, *, parts: Sequence[nn.Module] = ()) -> None:
        """Clip the gradient of each of `parts` (default: all of it), and step with the rate of this place in a run."""
        if self.sgd is None:
            return
        if self._spec.clip_norm:
            for part in parts or (self._module,):
                torch.nn.utils.clip_grad_norm_(list(part.parameters()), self._spec.clip_norm)
        rate = rate_at(self._spec, epoch=epoch, step=step, steps=steps)
        for group in self.sgd.param_groups:
            group["lr"] = rate
        self.sgd.step()
