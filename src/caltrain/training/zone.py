"""One zone of a model under training: what enclave and center each do in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.models.layers import Shape
from caltrain.models.network import Network, build, lay_out, set_draws
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import State, check_state, load_zone, state_of
from caltrain.models.wheel import Factory, no_wheel
from caltrain.training.initial import freeze, frozen_layers
from caltrain.training.optimiser import Descent
from caltrain.training.seeds import Draws, initialise
from caltrain.training.spec import TrainingSpec

MOMENTUM = "momentum/"
OnGrads = Callable[[list[Tensor]], None]
OnGradsAndLoss = Callable[[list[Tensor], float], None]


@dataclass(frozen=True)
class At:
    """A place in a run: `step` (of `steps`) in `epoch`."""

    epoch: int
    step: int
    steps: int


class Zone:
    """Consecutive layers with their optimiser. `forward` keeps the graph that `backward` then uses and frees.

    The first weights are drawn from `seed`; where the plan names initial ones, `training.initial.start_from` copies
    them into `module` afterwards. A zone all of whose layers are frozen learns nothing, and sends gradients on all the
    same: what crosses does not depend on it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: range,
        *,
        input_shape: Shape,
        training: TrainingSpec,
        seed: bytes,
        factory: Factory = no_wheel,
    ) -> None:
        self.module: Network = build(spec, input_shape=input_shape, layers=layers, factory=factory)
        initialise(self.module, seed)
        lay_out(self.module, channels_last=training.channels_last)
        freeze(self.module, frozen_layers(spec, training))
        self.module.train()
        self.descent = Descent(self.module, training)
        self._seed = seed
        self._input_grads: list[Tensor | None] = []
        self._outputs: tuple[Tensor, ...] = ()

    def forward(self, live: Sequence[Tensor], *, at: At, needs_input_grad: bool) -> tuple[Tensor, ...]:
        """What crosses at the end for one batch of what crossed at the start, each (N, ...), detached."""
        set_draws(self.module, Draws(self._seed, at.epoch, at.step))
        live = [x.detach() for x in live]
        self._input_grads = [None] * len(live)
        if needs_input_grad:
            for number, x in enumerate(live):
                self._watch(x, number)
        self._outputs, _ = self.module.through(live)
        return tuple(x.detach() for x in self._outputs)

    def _watch(self, x: Tensor, number: int) -> None:
        def keep(grad: Tensor) -> None:
            self._input_grads[number] = grad

        # The hook sees the gradient in the layout that the next zone's backward would have got it in.
        x.requires_grad_().register_hook(keep)  # type: ignore[no-untyped-call]

    def backward(self, grads: Sequence[Tensor], *, at: At, early: OnGrads = lambda _: None) -> list[Tensor]:
        """Step the optimiser with the gradients at the end; returns those at the start, if they were asked for.

        `early` is given them before the step: whoever waits for them need not wait for the optimiser.
        """
        outputs, self._outputs = self._outputs, ()
        if not outputs:  # there was no forward pass, or its gradients have come already
            return []
        pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad]
        if pairs:  # else all is frozen, and nothing in front of it is asked for
            self.descent.clear()
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        grads_in = [g for g in self._input_grads if g is not None]
        self._input_grads = []
        early(grads_in)
        if pairs:
            self.descent.step(at.epoch, at.step, at.steps)
        return grads_in

    def backward_from_labels(
        self, labels: Tensor, *, at: At, early: OnGradsAndLoss = lambda _grads, _loss: None
    ) -> tuple[list[Tensor], float]:
        """Like `backward` for the zone that ends in logits: mean cross-entropy. Returns (input gradients, loss)."""
        if not self._outputs:
            return [], 0.0
        logits = self._outputs[0].detach().requires_grad_()
        loss = F.cross_entropy(logits, labels)
        (grad,) = torch.autograd.grad(loss, logits)
        value = loss.item()
        return self.backward([grad], at=at, early=lambda grads: early(grads, value)), value

    def state(self) -> dict[str, Tensor]:
        """Copies of all that a checkpoint needs: weights and, as `momentum/...`, what the optimiser remembers."""
        held = state_of(self.module)
        for name, parameter in self.descent.parameters.items():
            momentum = self.descent.momentum(parameter)
            if momentum is not None:
                held[MOMENTUM + name] = momentum.detach().to("cpu", copy=True).contiguous()
        return held

    def load(self, state: State, *, step: str) -> None:
        """Take over such a state. Raises IntegrityError `weights.malformed` unless it fits in every part."""
        weights = {name: value for name, value in state.items() if not name.startswith(MOMENTUM)}
        momentum = {name.removeprefix(MOMENTUM): state[name] for name in state.keys() - weights.keys()}
        check_state({n: self.descent.parameters.get(n) for n in momentum}, momentum, step=step)
        load_zone(self.module, weights, step=step)
        self.descent.forget()
        for name, value in momentum.items():
            self.descent.remember(self.descent.parameters[name], value)

    def infer(self, live: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What crosses at the end, in the mode of inference; changes nothing."""
        self.module.eval()
        try:
            with torch.inference_mode():
                return self.module.through(live)[0]
        finally:
            self.module.train()


def of_layers(state: State, layers: range) -> dict[str, Tensor]:
    """The part of a zone's state that belongs to `layers`, by its names."""
    return {name: x for name, x in state.items() if int(name.removeprefix(MOMENTUM).partition(".")[0]) in layers}
