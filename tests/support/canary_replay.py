"""A run once more, step by step, from its revealed seed: what the enclave really held in each step.

`training.plain` is the reference for the weights; here every step is kept as well. That the final weights are those of
the run, bit for bit, shows that every batch, draw and weight before them was the run's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.models.network import Network, build, features_and_logits, lay_out, set_draws, zone_of
from caltrain.models.spec import ModelSpec, zone_ranges
from caltrain.plan import Plan
from caltrain.training.batches import augment, normalise
from caltrain.training.optimiser import Descent
from caltrain.training.seeds import Draws, RunSeeds, epoch_order, initialise
from caltrain.training.zone import MOMENTUM

State = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One step: which records (numbers in the manifest's order), augmented, as the FrontNet's input, and its IR."""

    epoch: int
    step: int
    batch: Tensor
    labels: Tensor
    pixels: Tensor
    x: Tensor
    ir: Tensor


@dataclass(frozen=True)
class Replay:
    """The whole run: `states[0]` are the first weights, `states[i]` those after i steps; with momentum."""

    steps: list[Step]
    states: list[State]
    order: Tensor
    spec: ModelSpec
    model: Network

    def inner(self, plan: Plan, state: State) -> State:
        """FrontNet's and HeadNet's part of a state."""
        front, _, head = zone_ranges(plan.model, plan.partition)
        return {name: value for name, value in state.items() if _layer(name) in {*front, *head}}

    def fingerprints(self, plan: Plan, pixels: Tensor) -> Tensor:
        """Those of all records in the pool's last order: the order in which the enclave links them."""
        x = normalise(pixels[self.order], plan.data, channels_last=plan.training.channels_last)
        with torch.inference_mode():
            return features_and_logits(self.model, self.spec, x)[0]


def replay(plan: Plan, *, pixels: Tensor, labels: Tensor, seeds: RunSeeds) -> Replay:
    """Train on `pixels` (N, C, H, W) and `labels` (N,) in the manifest's order, as the run of `seeds` did."""
    spec, training = plan.model, plan.training
    torch.set_num_threads(training.threads)
    model = build(spec, input_shape=plan.data.shape)
    keys = (seeds.front, seeds.center, seeds.head)
    parts = zip(zone_ranges(spec, plan.partition), keys, strict=True)
    zones = [(zone_of(model, spec, layers), key) for layers, key in parts if layers]
    for zone, key in zones:
        initialise(zone, key)
    lay_out(model, channels_last=training.channels_last)
    model.train()
    descent = Descent(model, training)
    steps, order = len(labels) // training.batch, torch.arange(len(labels))
    kept, states = [], [_copy(model, descent)]
    for epoch in range(training.epochs):
        order = order[epoch_order(len(labels), seed=seeds.order, epoch=epoch)]
        for step in range(steps):
            batch = order[step * training.batch : (step + 1) * training.batch]
            seen = augment(pixels[batch], training.augment, Draws(seeds.augment, epoch, step), size=spec.size)
            x = normalise(seen, plan.data, channels_last=training.channels_last)
            for zone, key in zones:
                set_draws(zone, Draws(key, epoch, step))
            outputs = [x]
            for zone, _ in zones:
                outputs.append(zone(outputs[-1]))
            loss = F.cross_entropy(outputs[-1], labels[batch])
            kept.append(Step(epoch, step, batch, labels[batch], seen, x, outputs[1].detach()))
            descent.clear()
            loss.backward()  # type: ignore[no-untyped-call]
            descent.step(epoch, step, steps, parts=[zone for zone, _ in zones])
            states.append(_copy(model, descent))
    return Replay(kept, states, order, spec, model.eval())


def weights(state: State) -> State:
    """A state without the optimiser's momentum."""
    return {name: value for name, value in state.items() if not name.startswith(MOMENTUM)}


def _copy(model: Network, descent: Descent) -> State:
    held = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in descent.parameters.items():
        momentum = descent.momentum(parameter)
        if momentum is not None:
            held[MOMENTUM + name] = momentum.detach().clone()
    return held


def _layer(name: str) -> int:
    return int(name.removeprefix(MOMENTUM).partition(".")[0])
