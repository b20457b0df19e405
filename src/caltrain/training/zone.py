"""One zone of a model under training: what enclave and center each do in a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.models.network import build, lay_out, set_draws
from caltrain.models.spec import ModelSpec, Shape
from caltrain.training.optimiser import optimiser, rate_at, set_rate
from caltrain.training.seeds import Draws, initialise
from caltrain.training.spec import TrainingSpec


class Zone:
    """Consecutive layers with their optimiser. `forward` keeps the graph that `backward` then uses and frees."""

    def __init__(self, spec: ModelSpec, layers: range, *, input_shape: Shape, training: TrainingSpec, seed: bytes):
        self.module: nn.Sequential = build(spec, input_shape=input_shape, layers=layers)
        initialise(self.module, seed)
        lay_out(self.module, channels_last=training.channels_last)
        self.module.train()
        self._training, self._seed = training, seed
        # A zone without weights (a FrontNet of no layers, a HeadNet of a flatten) has nothing to optimise.
        has_weights = next(self.module.parameters(), None) is not None
        self._sgd = optimiser(self.module, training) if has_weights else None
        self._input_grad: Tensor | None = None
        self._output: Tensor | None = None

    def forward(self, x: Tensor, *, epoch: int, step: int, needs_input_grad: bool) -> Tensor:
        """Output of the zone for one batch (N, ...), detached: it is what crosses."""
        set_draws(self.module, Draws(self._seed, epoch, step))
        x = x.detach()
        if needs_input_grad:
            x.requires_grad_()
            # The hook sees the gradient in the layout that the next zone's backward would have got it in.
            x.register_hook(self._keep)  # type: ignore[no-untyped-call]
        self._output = cast(Tensor, self.module(x))
        return self._output.detach()

    def backward(self, grad: Tensor, *, epoch: int, step: int, steps: int) -> Tensor | None:
        """Step the optimiser with the gradient at the output; returns the gradient at the input, if asked for."""
        return self._descend(lambda output: torch.autograd.backward(output, grad), epoch=epoch, step=step, steps=steps)

    def backward_from_labels(self, labels: Tensor, *, epoch: int, step: int, steps: int) -> tuple[Tensor | None, float]:
        """Like `backward` for the zone that ends in logits: mean cross-entropy. Returns (input gradient, loss)."""
        loss = torch.empty(())

        def from_loss(output: Tensor) -> None:
            nonlocal loss
            loss = F.cross_entropy(output, labels)
            loss.backward()  # type: ignore[no-untyped-call]

        grad = self._descend(from_loss, epoch=epoch, step=step, steps=steps)
        return grad, float(loss.detach())

    def _descend(self, run_backward: Callable[[Tensor], None], *, epoch: int, step: int, steps: int) -> Tensor | None:
        output, self._output, self._input_grad = self._output, None, None
        if output is not None and output.requires_grad:
            self.module.zero_grad(set_to_none=True)
            run_backward(output)
            if self._sgd is not None:
                set_rate(self._sgd, rate_at(self._training, epoch=epoch, step=step, steps=steps))
                self._sgd.step()
        return self._input_grad

    def _keep(self, grad: Tensor) -> None:
        self._input_grad = grad
