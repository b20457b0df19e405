"""A model trained in three zones by hand, without processes, to compare with the plain loop bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from caltrain.models.spec import ModelSpec, Partition, zone_ranges
from caltrain.models.weights import state_of
from caltrain.models.wheel import Factory, no_wheel
from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment, normalise
from caltrain.training.initial import start_from
from caltrain.training.plain import train_plain
from caltrain.training.seeds import Draws, RunSeeds, epoch_order
from caltrain.training.spec import TrainingSpec
from caltrain.training.zone import At, Zone

State = dict[str, Tensor]
SEEDS = RunSeeds.from_run_seed(bytes(range(32)))
SCHEMA = DataSchema(shape=(3, 8, 8), classes=("a", "b", "c"), mean=(0.4, 0.5, 0.6), std=(0.2,))
RECORDS = 21  # with batches of six: three and a rest
PIXELS = torch.randint(0, 256, (RECORDS, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (RECORDS,), generator=torch.Generator().manual_seed(2))


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels on another number of threads give other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def zones(
    spec: ModelSpec,
    partition: Partition,
    training: TrainingSpec,
    *,
    factory: Factory = no_wheel,
    initial: State | None = None,
) -> tuple[Zone, Zone, Zone]:
    """FrontNet, CenterNet and HeadNet with their first weights."""
    keys = (SEEDS.front, SEEDS.center, SEEDS.head)
    front, center, head = (
        Zone(spec, layers, input_shape=SCHEMA.shape, training=training, seed=key, factory=factory)
        for layers, key in zip(zone_ranges(spec, partition), keys, strict=True)
    )
    for zone in (front, center, head):
        if initial is not None:
            start_from(zone.module, initial, spec)
    return front, center, head


def split_state(
    spec: ModelSpec,
    partition: Partition,
    training: TrainingSpec,
    *,
    factory: Factory = no_wheel,
    initial: State | None = None,
) -> State:
    """Weights after training in zones."""
    front, center, head = zones(spec, partition, training, factory=factory, initial=initial)
    steps, order = RECORDS // training.batch, torch.arange(RECORDS)
    for epoch in range(training.epochs):
        order = order[epoch_order(RECORDS, seed=SEEDS.order, epoch=epoch)]
        for step in range(steps):
            at, batch = At(epoch, step, steps), order[step * training.batch : (step + 1) * training.batch]
            x = augment(PIXELS[batch], training.augment, Draws(SEEDS.augment, epoch, step), size=spec.size)
            x = normalise(x, SCHEMA, channels_last=training.channels_last)
            ir = cross(front.forward([x], at=at, needs_input_grad=False))
            out = center.forward(ir, at=at, needs_input_grad=True)
            if partition.head:
                head.forward(cross(out), at=at, needs_input_grad=True)
                back, _ = head.backward_from_labels(LABELS[batch], at=at)
                grads = center.backward(cross(back), at=at)
            else:
                grads, _ = center.backward_from_labels(LABELS[batch], at=at)
            front.backward(cross(grads), at=at)
    return state_of(front.module, center.module, head.module)


def plain_state(
    spec: ModelSpec,
    partition: Partition,
    training: TrainingSpec,
    *,
    factory: Factory = no_wheel,
    initial: State | None = None,
) -> State:
    """Weights after training in the plain loop."""
    model = train_plain(
        spec, partition, SCHEMA, training,
        pixels=PIXELS, labels=LABELS, seeds=SEEDS, factory=factory, initial=initial,
    )  # fmt: skip
    return state_of(model)


def cross(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the other process gets: copies with the same strides, and no graph."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.detach()) for x in tensors]


def differing(one: State, other: State) -> set[str]:
    """Names whose values differ in any bit."""
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}
