"""Training: the plain loop bit for bit, no label or logit outside in ternary form, no center that misbehaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.crypto.digests import to_raw, to_text
from caltrain.enclave.run import State, present
from caltrain.models.layers import Conv, Flatten, Linear, Shortcut
from caltrain.models.spec import ModelSpec, Partition
from caltrain.plan import Plan
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds, epoch_order
from support.recovery import planned, same_bits
from support.tampering import changed, tamper
from support.world import CLASSES, World

STEPS, BATCH = 3, 8  # of 27 records three are left out of each epoch


# --- the honest run -------------------------------------------------------------------------------------------------


def cut_at_input(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, partition=Partition(front=0, head=1, unsafe_cut_at_input=True))


def plainest(plan: Plan) -> Plan:
    training = msgspec.structs.replace(plan.training, channels_last=False, schedule="constant", batch=5)
    return msgspec.structs.replace(plan, training=training)


def two_tensors_live(plan: Plan) -> Plan:
    """At both cuts two tensors cross: the block's input goes around it, and again around the last one."""
    layers = (
        Conv(filters=4),
        Conv(filters=4),
        Conv(filters=4),
        Conv(filters=4),
        Shortcut(source=1),
        Flatten(),
        Linear(units=len(CLASSES)),
    )
    return msgspec.structs.replace(plan, model=ModelSpec(layers=layers), partition=Partition(front=3, head=3))


WORLDS: dict[str, Callable[[], World]] = {
    "two-way": lambda: World(head=0),
    "ternary, HeadNet of the last layer": lambda: World(head=1),
    "ternary, HeadNet of two layers": lambda: World(head=2),
    "ternary, of floats": lambda: World(dtype="f32", epochs=3),
    "two-way, of floats": lambda: World(head=0, dtype="f32", epochs=3),
    "cut at the input": lambda: World(change=cut_at_input),
    "another layout, batch and schedule": lambda: World(change=plainest),
    "two tensors at both cuts": lambda: World(change=two_tensors_live),
    "clipped": lambda: World(change=planned(clip_norm=0.1)),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_weights_are_those_of_the_plain_loop_bit_for_bit(name: str) -> None:
    world = WORLDS[name]().run_to(State.RELEASED)
    assert same_bits(world, world.plain(world.run.seed))


@pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
def test_the_loss_of_each_epoch_is_that_of_the_plain_loop(head: int) -> None:
    world = World(head=head).run_to(State.READY)
    told = [world.train() for _ in range(2)]
    losses = [0.0, 0.0]

    def add(epoch: int, _step: int, loss: float) -> None:
        losses[epoch] += loss

    world.plain(world.run.seed, on_step=add)
    losses = [loss / STEPS for loss in losses]
    assert [reply.loss for reply in told] == losses
    noted = [event.body for event in world.chain() if event.kind == "epoch"]
    assert noted == [{"epoch": i, "loss": f"{loss:.6f}", "records": 24} for i, loss in enumerate(losses)]


@pytest.mark.parametrize("what", ["a record", "a label", "the seed", "a gradient"])
def test_the_comparison_notices_the_smallest_change(what: str) -> None:
    world = World(records=8).run_to(State.READY)  # no record is left out of an epoch
    if what == "a gradient":
        tamper(world, "ir-grad", changed(lambda x: x * 1.001))
    world.run_to(State.RELEASED)
    pixels, labels = world.data()
    if what == "a record":
        pixels[4] = 255 - pixels[4]
    if what == "a label":
        labels[4] = (labels[4] + 1) % 3
    seed = bytes(32) if what == "the seed" else world.run.seed
    plan = world.plan
    other = train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=pixels,
        labels=labels,
        seeds=RunSeeds.from_run_seed(seed),
    )
    assert not same_bits(world, other)


@pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
def test_exactly_these_tensors_cross(head: int) -> None:
    world = World(head=head).run_to(State.TRAINED)
    roles = ("ir", "center-grad") if head else ("ir", "labels")
    assert [(h.role, h.epoch, h.step) for h in world.host.out()] == [
        (role, epoch, step) for epoch in range(2) for step in range(STEPS) for role in roles
    ]
    shapes: dict[str, tuple[Any, ...]] = {
        "ir": ((BATCH, 4, 2, 2), "f32"),
        "center-grad": ((BATCH, 4, 2, 2), "f32"),
        "labels": ((BATCH,), "i64"),
    }
    assert {(h.role, *((p.shape, p.dtype) for p in h.parts)) for h in world.host.out()} == {
        (r, shapes[r]) for r in roles
    }
    assert {h.run for h in world.host.out()} == {world.run.vault.run}


def test_in_ternary_form_no_label_and_no_logit_comes_out() -> None:
    world = World().run_to(State.READY)
    logits: list[bytes] = []
    *_, last = present(world.run.head).module.children()
    last.register_forward_hook(lambda _module, _inputs, out: logits.append(out.detach().numpy().tobytes()))
    world.run_to(State.LINKED)
    assert len(logits) == 2 * STEPS
    batches = list(label_batches(world))
    # A batch of equal labels says nothing: zeros are everywhere.
    labels = [b.astype(kind).tobytes() for b in batches if len(set(b)) > 1 for kind in (np.int64, np.int32, np.uint8)]
    sent = bytes(world.host.enclave_end.sent)
    assert labels
    assert not [raw for raw in logits + labels if raw in sent]


def test_in_two_way_form_the_labels_do_come_out() -> None:
    world = World(head=0).run_to(State.LINKED)
    sent = bytes(world.host.enclave_end.sent)
    assert all(labels.astype(np.int64).tobytes() in sent for labels in label_batches(world))


def label_batches(world: World) -> Iterator[Any]:
    """Labels of each batch of the run, in the order in which they are trained on."""
    _, labels = world.data()
    order = torch.arange(len(labels))
    for epoch in range(2):
        order = order[epoch_order(len(labels), seed=world.run.seeds.order, epoch=epoch)]
        for step in range(STEPS):
            yield labels[order[step * BATCH : (step + 1) * BATCH]].numpy()


def test_the_center_is_committed_to_after_each_epoch_and_the_chain_names_it() -> None:
    world = World().run_to(State.READY)
    commitments = []
    for epoch in (1, 2):
        world.train()
        commitments.append(to_text(world.host.the_center.commit(epoch, 0)))
    noted = [event.body for event in world.chain() if event.kind == "checkpoint" and event.body.get("center")]
    assert [(body["epoch"], body["step"], body["center"]) for body in noted] == [
        (1, 0, commitments[0]),
        (2, 0, commitments[1]),
    ]
    assert world.course.center == to_raw(commitments[-1])


def test_progress_is_told_step_by_step() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    told = [c.message for c in world.host.log if isinstance(c.message, m.Progress) and c.message.phase == "train"]
    assert [(p.done, p.total) for p in told] == [(1, 3), (2, 3), (3, 3)]
    assert f"{told[-1].loss:.6f}" == next(e.body["loss"] for e in world.chain() if e.kind == "epoch")
