"""The plain reference: ordinary PyTorch over the unsplit module, with no code of enclave or host.

Given the run seed (which leaves the enclave only sealed to the parties, after the run) and the same records in the
manifest's order, it must end with the same weights, bit for bit, on the CPU with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.models.network import Network, build, lay_out, set_draws, zone_of
from caltrain.models.spec import ModelSpec, Partition, zone_ranges
from caltrain.models.weights import State
from caltrain.models.wheel import Factory, no_wheel
from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment, normalise
from caltrain.training.initial import check_given, freeze, frozen_layers, start_from
from caltrain.training.optimiser import Descent
from caltrain.training.prefetch import Prefetch
from caltrain.training.seeds import Draws, RunSeeds, epoch_order, initialise
from caltrain.training.spec import TrainingSpec

OnStep = Callable[[int, int, float], None]
OnEpoch = Callable[[int, Network], bool | None]
"""Told the epoch and the model after it; True where no other epoch is wanted."""


class Part(NamedTuple):
    """Layers that share a key for their draws, and a norm for clipping: what the partition means to this loop."""

    module: Network
    seed: bytes


def train_plain(
    spec: ModelSpec,
    partition: Partition,
    schema: DataSchema,
    training: TrainingSpec,
    *,
    pixels: Tensor,
    labels: Tensor,
    seeds: RunSeeds,
    cuts: Mapping[int, int] | None = None,
    on_step: OnStep = lambda _epoch, _step, _loss: None,
    on_epoch: OnEpoch = lambda _epoch, _model: None,
    factory: Factory = no_wheel,
    initial: State | None = None,
) -> Network:
    """Train on `pixels` (N, C, H, W) u8 or f32 and `labels` (N,) int64; returns the model in eval mode.

    `cuts` gives layers of the FrontNet by epoch, where they differ from the partition's schedule. `initial` are the
    weights that `training.initial` names. Raises ConfigError and IntegrityError as `training.initial` does.
    """
    check_given(training, initial)
    torch.set_num_threads(training.threads)
    model = build(spec, input_shape=schema.shape, factory=factory)
    for part in _parts(model, spec, partition, seeds):
        initialise(part.module, part.seed)
    lay_out(model, channels_last=training.channels_last)
    if initial is not None:
        start_from(model, initial, spec, frozen=frozen_layers(spec, training))
    freeze(model, frozen_layers(spec, training))
    model.train()
    descent = Descent(model, training)
    steps, order = len(labels) // training.batch, torch.arange(len(labels))
    for epoch in range(training.epochs):
        order = order[epoch_order(len(labels), seed=seeds.order, epoch=epoch)]
        front = (cuts or {}).get(epoch, partition.front_at(epoch))
        parts = _parts(model, spec, partition.at(front), seeds)
        make = partial(_batch, spec, schema, training, pixels=pixels, labels=labels, seed=seeds.augment, epoch=epoch)
        batches = (make(order, step) for step in range(steps))
        with closing(Prefetch(batches)) as ready:
            for step, (x, y) in enumerate(ready):
                for part in parts:
                    set_draws(part.module, Draws(part.seed, epoch, step))
                loss = F.cross_entropy(model(x), y)
                descent.clear()
                loss.backward()  # type: ignore[no-untyped-call]
                descent.step(epoch, step, steps, parts=[part.module for part in parts])
                on_step(epoch, step, loss.item())
        if on_epoch(epoch, model):
            break
    model.eval()
    return model


def _batch(
    spec: ModelSpec,
    schema: DataSchema,
    training: TrainingSpec,
    order: Tensor,
    step: int,
    *,
    pixels: Tensor,
    labels: Tensor,
    seed: bytes,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    rows = order[step * training.batch : (step + 1) * training.batch]
    x = augment(pixels[rows], training.augment, Draws(seed, epoch, step), size=spec.size)
    return normalise(x, schema, channels_last=training.channels_last), labels[rows]


def _parts(model: Network, spec: ModelSpec, partition: Partition, seeds: RunSeeds) -> list[Part]:
    zones = zip(zone_ranges(spec, partition), (seeds.front, seeds.center, seeds.head), strict=True)
    return [Part(zone_of(model, spec, layers), seed) for layers, seed in zones if layers]
