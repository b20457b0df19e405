"""A run once more, step by step, from its revealed seed: what the enclave really held in each step.

`training.plain` is the reference for the weights; here every step is kept as well. That the final weights are those of
the run, bit for bit, shows that every batch, draw and weight before them was the run's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caltrain.models.network import build, features_and_logits, lay_out, set_draws, zone_of, zone_ranges
from caltrain.plan import Plan
from caltrain.training.batches import augment, normalise
from caltrain.training.optimiser import optimiser, rate_at, set_rate
from caltrain.training.seeds import Draws, RunSeeds, epoch_order, initialise

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
    """The whole run: `states[0]` are the first weights, `states[i]` those after i steps; fingerprints (N, D)."""

    steps: list[Step]
    states: list[State]
    order: Tensor
    model: nn.Sequential

    def inner(self, plan: Plan, state: State) -> State:
        """FrontNet's and HeadNet's part of a state."""
        front, _, head = zone_ranges(plan.model, plan.partition)
        return {name: value for name, value in state.items() if int(name.split(".")[0]) in {*front, *head}}

    def fingerprints(self, plan: Plan, pixels: Tensor) -> Tensor:
        """Those of all records in the pool's last order: the order in which the enclave links them."""
        x = normalise(pixels[self.order], plan.data, channels_last=plan.training.channels_last)
        with torch.inference_mode():
            return features_and_logits(self.model, x)[0]


def replay(plan: Plan, *, pixels: Tensor, labels: Tensor, seeds: RunSeeds) -> Replay:
    """Train on `pixels` (N, C, H, W) and `labels` (N,) in the manifest's order, as the run of `seeds` did."""
    spec, training = plan.model, plan.training
    torch.set_num_threads(training.threads)
    model = build(spec, input_shape=plan.data.shape)
    keys = (seeds.front, seeds.center, seeds.head)
    zones = [(zone_of(model, r), key) for r, key in zip(zone_ranges(spec, plan.partition), keys, strict=True)]
    for zone, key in zones:
        initialise(zone, key)
    lay_out(model, channels_last=training.channels_last)
    model.train()
    sgd = optimiser(model, training)
    steps, order = len(labels) // training.batch, torch.arange(len(labels))
    kept, states = [], [_copy(model)]
    for epoch in range(training.epochs):
        order = order[epoch_order(len(labels), seed=seeds.order, epoch=epoch)]
        for step in range(steps):
            batch = order[step * training.batch : (step + 1) * training.batch]
            seen = augment(pixels[batch], training.augment, Draws(seeds.augment, epoch, step))
            x = normalise(seen, plan.data, channels_last=training.channels_last)
            for zone, key in zones:
                set_draws(zone, Draws(key, epoch, step))
            outputs = [x]
            for zone, _ in zones:
                outputs.append(zone(outputs[-1]))
            loss = F.cross_entropy(outputs[-1], labels[batch])
            kept.append(Step(epoch, step, batch, labels[batch], seen, x, outputs[1].detach()))
            set_rate(sgd, rate_at(training, epoch=epoch, step=step, steps=steps))
            sgd.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            states.append(_copy(model))
    return Replay(kept, states, order, model.eval())


def _copy(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
