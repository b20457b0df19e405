"""A model trained in zones, by hand and in one process, to be held against the plain loop.

What crosses a cut is a copy with the same memory layout, as it is between processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from caltrain.models.layers import AvgPool, Conv, Dropout, Flatten, Linear, MaxPool, Norm, Patches, Route, Shortcut
from caltrain.models.layers import Transformer as Tf
from caltrain.models.spec import ModelSpec, Partition, zone_ranges
from caltrain.models.weights import state_of
from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment, normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import Draws, RunSeeds, epoch_order
from caltrain.training.spec import Augment, TrainingSpec
from caltrain.training.zone import At, Zone

SEEDS = RunSeeds.from_run_seed(bytes(range(32)))
SCHEMA = DataSchema(shape=(3, 8, 8), classes=("a", "b", "c"), mean=(0.4, 0.5, 0.6), std=(0.2,))
CHAIN = ModelSpec(
    layers=(
        Conv(filters=6, batch_norm=True, activation="leaky"),
        Dropout(p=0.2),
        Conv(filters=5, stride=2),
        MaxPool(),
        Conv(filters=4, kernel=1, padding=0, activation="none"),
        AvgPool(),
        Linear(units=7, activation="relu"),
        Dropout(p=0.3),
        Linear(units=3),
    )
)
FLAT = ModelSpec(layers=(Conv(filters=4), MaxPool(), Flatten(), Linear(units=6, activation="leaky"), Linear(units=3)))
RESIDUAL = ModelSpec(
    layers=(
        Conv(filters=4, batch_norm=True),
        Conv(filters=4, batch_norm=True, activation="none"),
        Shortcut(source=0, activation="relu"),
        Dropout(p=0.3),
        Conv(filters=6, stride=2, batch_norm=True, activation="leaky"),
        Route(sources=(2,)),
        Conv(filters=6, kernel=1, padding=0, stride=2, activation="none"),
        Shortcut(source=4),
        Route(sources=(7, 4)),
        MaxPool(kernel=2, stride=2, padding=1),
        AvgPool(),
        Linear(units=3),
    )
)
VIT = ModelSpec(
    layers=(
        Patches(size=2, width=8),
        Tf(heads=2, ratio=2, p=0.2),
        Tf(heads=4, ratio=1),
        Norm(),
        AvgPool(),
        Linear(units=3),
    ),
    size=(6, 6),
)
TRAINING = TrainingSpec(
    epochs=2,
    batch=6,
    learning_rate=0.05,
    weight_decay=0.001,
    warmup_epochs=1,
    augment=Augment(shift=1, flip=True),
    threads=1,
)
RECORDS = 21  # three batches of six and a rest
PIXELS = torch.randint(0, 256, (RECORDS, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (RECORDS,), generator=torch.Generator().manual_seed(2))
State = dict[str, Tensor]
Edit = Callable[[Sequence[Tensor]], list[Tensor]]
MOMENTUM = "momentum/"


def cross(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the other process gets."""
    return [tensor.clone(memory_format=torch.preserve_format) for tensor in tensors]


def zones_of(spec: ModelSpec, partition: Partition, training: TrainingSpec, seeds: RunSeeds) -> list[Zone]:
    """FrontNet, CenterNet and HeadNet with their first weights."""
    keys = (seeds.front, seeds.center, seeds.head)
    return [
        Zone(spec, layers, input_shape=SCHEMA.shape, training=training, seed=key)
        for layers, key in zip(zone_ranges(spec, partition), keys, strict=True)
    ]


def taken_over(zones: Sequence[Zone], new: list[Zone]) -> list[Zone]:
    """`new` zones with the weights and momentum that all layers have in `zones`."""
    held: State = {}
    for zone in zones:
        held |= zone.state()
    for zone in new:
        layers = {name for name, _ in zone.module.named_children()}
        own = {name: value for name, value in held.items() if name.removeprefix(MOMENTUM).split(".")[0] in layers}
        zone.load(own, step="deepen")
    return new


def train_split(
    spec: ModelSpec,
    partition: Partition,
    training: TrainingSpec,
    *,
    pixels: Tensor = PIXELS,
    seeds: RunSeeds = SEEDS,
    cuts: Mapping[int, int] | None = None,
    on_gradients: Edit = cross,
) -> State:
    """The protocol's step by hand: enclave, center and (ternary) head, each with its own zone."""
    zones, front = zones_of(spec, partition, training, seeds), partition.front
    steps, order = RECORDS // training.batch, torch.arange(RECORDS)
    for epoch in range(training.epochs):
        order = order[epoch_order(RECORDS, seed=seeds.order, epoch=epoch)]
        wanted = (cuts or {}).get(epoch, partition.front_at(epoch))
        if wanted != front:
            front = wanted
            zones = taken_over(zones, zones_of(spec, partition.at(front), training, seeds))
        for step in range(steps):
            batch, at = order[step * training.batch : (step + 1) * training.batch], At(epoch, step, steps)
            x = augment(pixels[batch], training.augment, Draws(seeds.augment, epoch, step), size=spec.size)
            x = normalise(x, SCHEMA, channels_last=training.channels_last)
            train_step(zones, x, LABELS[batch], at=at, head=partition.head > 0, on_gradients=on_gradients)
    return state_of(*(zone.module for zone in zones))


def train_step(
    zones: Sequence[Zone], x: Tensor, labels: Tensor, *, at: At, head: bool, on_gradients: Edit = cross
) -> float:
    """One step over all zones; returns the loss."""
    front, center, last = zones
    live = center.forward(cross(front.forward((x,), at=at, needs_input_grad=False)), at=at, needs_input_grad=True)
    if head:
        last.forward(cross(live), at=at, needs_input_grad=True)
        grads, loss = last.backward_from_labels(labels, at=at)
        grads = center.backward(cross(grads), at=at)
    else:
        grads, loss = center.backward_from_labels(labels, at=at)
    front.backward(on_gradients(grads), at=at)
    return loss


def plain_state(
    spec: ModelSpec, partition: Partition, training: TrainingSpec, *, cuts: Mapping[int, int] | None = None
) -> State:
    """What the plain loop ends with."""
    return state_of(
        train_plain(spec, partition, SCHEMA, training, pixels=PIXELS, labels=LABELS, seeds=SEEDS, cuts=cuts)
    )


def differing(one: State, other: State) -> set[str]:
    """Names of what is not the same, bit for bit."""
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}
