"""Every included model, cut in both forms and several places, ends with the bits of the plain loop.

The steps are those of enclave and center; what crosses is laid out as the boundary lays it out. And the losses of the
first steps are those that were written down: see `support.golden`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from caltrain.boundary.tensors import flatten
from caltrain.models.spec import ModelSpec, Partition, check_model, live_at, zone_ranges
from caltrain.models.weights import state_of
from caltrain.records.schema import DataSchema
from caltrain.training.batches import augment, normalise
from caltrain.training.plain import train_plain
from caltrain.training.seeds import Draws, RunSeeds, epoch_order
from caltrain.training.spec import Augment, TrainingSpec
from caltrain.training.zone import At, Zone
from support import golden
from support.networks import CLASSES, FROM_FILES, SMALL

SEEDS = RunSeeds.from_run_seed(bytes(32))
MODELS = [pytest.param(name, marks=pytest.mark.data if name in FROM_FILES else ()) for name in SMALL]
# Of a chain, one tensor crosses anywhere; these graphs must be cut where several do.
BRANCHED = {"resnet18", "densenet201"}


def across(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the other side gets: a dense copy with the announced strides."""
    dense = [flatten(tensor)[0] for tensor in tensors]
    return [torch.empty_strided(t.shape, t.stride()).copy_(t) for t in dense]


class Split:
    """A run in three zones, in one process."""

    def __init__(self, spec: ModelSpec, cut: Partition, schema: DataSchema, training: TrainingSpec) -> None:
        self.spec, self.schema, self.training = spec, schema, training
        keys = (SEEDS.front, SEEDS.center, SEEDS.head)
        self.front, self.center, self.head = (
            Zone(spec, layers, input_shape=schema.shape, training=training, seed=key)
            for layers, key in zip(zone_ranges(spec, cut), keys, strict=True)
        )
        self.ternary = cut.head > 0

    def step(self, x: Tensor, labels: Tensor, at: At) -> None:
        """One batch forth and back."""
        live = across(self.front.forward((x,), at=at, needs_input_grad=False))
        live = across(self.center.forward(live, at=at, needs_input_grad=True))
        if self.ternary:
            self.head.forward(live, at=at, needs_input_grad=True)
            grads, _ = self.head.backward_from_labels(labels, at=at)
            grads = self.center.backward(across(grads), at=at)
        else:
            grads, _ = self.center.backward_from_labels(labels, at=at)
        self.front.backward(across(grads), at=at)

    def run(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """All epochs; returns the weights."""
        torch.set_num_threads(self.training.threads)  # on other than the plain loop's, last bits differ
        spec, batch, order = self.training, self.training.batch, torch.arange(len(labels))
        steps = len(labels) // batch
        for epoch in range(spec.epochs):
            order = order[epoch_order(len(labels), seed=SEEDS.order, epoch=epoch)]
            for step in range(steps):
                chosen = order[step * batch : (step + 1) * batch]
                x = augment(pixels[chosen], spec.augment, Draws(SEEDS.augment, epoch, step), size=self.spec.size)
                x = normalise(x, self.schema, channels_last=spec.channels_last)
                self.step(x, labels[chosen], At(epoch, step, steps))
        return state_of(self.front.module, self.center.module, self.head.module)


def differing(name: str, cut: Partition, *, epochs: int, channels_last: bool, threads: int) -> list[str]:
    """Names of weights that a split run and the plain loop do not agree on, bit for bit."""
    small = SMALL[name]
    spec, schema, (pixels, labels) = small.make(), small.schema, small.data()
    check_model(spec, cut, input_shape=schema.shape, classes=CLASSES)
    training = TrainingSpec(
        epochs=epochs,
        batch=small.batch,
        learning_rate=0.05,
        weight_decay=1e-3,
        schedule="poly",
        burn_in=1,
        clip_norm=2.0,
        augment=Augment(flip=True, hue=0.1, saturation=0.3, exposure=0.3) if schema.shape[0] == 3 else Augment(),
        channels_last=channels_last,
        threads=threads,
    )
    split = Split(spec, cut, schema, training).run(pixels, labels)
    plain = state_of(train_plain(spec, cut, schema, training, pixels=pixels, labels=labels, seeds=SEEDS))
    assert split.keys() == plain.keys()
    return [key for key in split if not torch.equal(split[key], plain[key])]


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("form", ["two-way", "ternary"])
@pytest.mark.parametrize("name", MODELS)
def test_a_split_run_ends_with_the_bits_of_the_plain_loop(name: str, form: str, channels_last: bool) -> None:
    epochs = 1 if name in FROM_FILES else 2
    for front, head in SMALL[name].cuts:
        cut = Partition(front=front, head=head if form == "ternary" else 0)
        found = differing(name, cut, epochs=epochs, channels_last=channels_last, threads=1)
        assert found == [], f"front {front}, head {head}"


def test_so_it_does_on_two_threads() -> None:
    assert differing("10-layer", Partition(front=2, head=2), epochs=1, channels_last=True, threads=2) == []


@pytest.mark.parametrize("name", MODELS)
def test_three_cuts_each_and_several_tensors_cross_where_a_graph_branches(name: str) -> None:
    small = SMALL[name]
    spec = small.make()
    assert len(set(small.cuts)) >= 3
    starts = {cut for front, head in small.cuts for cut in (front, len(spec.layers) - head)}
    assert (max(len(live_at(spec.layers, cut)) for cut in starts) > 1) == (name in BRANCHED)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_losses_are_those_written_down(name: str) -> None:
    assert golden.losses(name) == pytest.approx(golden.read()[name], rel=golden.TOLERANCE)


def test_losses_are_written_down_for_every_included_model() -> None:
    written = golden.read()
    assert written.keys() == SMALL.keys()
    assert all(len(losses) == SMALL[name].steps for name, losses in written.items())
