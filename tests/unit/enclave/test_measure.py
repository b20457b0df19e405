"""Held-out records: measured as a plain program would, never trained on, never named, and no label of them outside."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from caltrain.boundary import messages as m
from caltrain.boundary.messages import Measured
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave import measure as measure_module
from caltrain.enclave import train as train_module
from caltrain.enclave.run import State, present
from caltrain.provenance.statements import ModelStatement
from caltrain.training.batches import normalise
from support.recovery import ends_as_if_undisturbed, planned, recovers, same_bits
from support.tampering import changed, message, one_element, tamper
from support.world import World, pictures

FORMS = pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
CONSTANT = planned(schedule="constant")


def measured_plainly(world: World, epochs: int) -> Measured:
    """The plain loop's model after so many epochs, on the held-out records."""
    model = world.plain(world.run.seed, epochs=epochs)
    pixels, labels = world.data(held_out=True)
    with torch.inference_mode():
        logits = model(normalise(pixels, world.plan.data, channels_last=world.plan.training.channels_last))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    loss = F.cross_entropy(logits, labels).item()
    return Measured(len(labels), loss, float((ranks < 1).float().mean()), float((ranks < 2).float().mean()))


@FORMS
@pytest.mark.parametrize("batch", [256, 3])
def test_loss_and_accuracy_are_those_of_the_joined_model_of_that_epoch(
    head: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "_BATCH", batch)
    world = World(head=head, held_out=3, epochs=3, change=CONSTANT).run_to(State.READY)
    found = [present(world.train().held_out) for _ in range(3)]
    for epoch, own in enumerate(found):
        due = measured_plainly(world, epoch + 1)
        assert own.records == due.records == 12
        assert own.loss == round(own.loss, 3) == pytest.approx(due.loss, abs=6e-4)
        assert (own.top1, own.top2) == pytest.approx((due.top1, due.top2), abs=6e-4)
    noted = [event.body for event in world.chain() if event.kind == "epoch"]
    told = [(f"{own.loss:.3f}", f"{own.top1:.3f}", f"{own.top2:.3f}") for own in found]
    assert [(body["held_out"], body["top1"], body["top2"]) for body in noted] == told


def test_without_held_out_records_nothing_is_measured() -> None:
    world = World().run_to(State.READY)
    assert world.train().held_out is None
    assert "held_out" not in next(event.body for event in world.chain() if event.kind == "epoch")
    assert {head.role for head in world.host.out()} == {"ir", "center-grad"}
    assert not [name for name in world.host.storage if name.startswith("held-out")]


@FORMS
def test_held_out_records_are_not_trained_on(head: int) -> None:
    """The plain loop never sees them, and the manifest counts them apart."""
    world = World(head=head, held_out=2)
    ends_as_if_undisturbed(world)
    assert (world.manifest.records(), world.manifest.records(held_out=True)) == (19, 8)
    assert [e.body["records"] for e in world.chain() if e.kind == "epoch"] == [16, 16]


@FORMS
def test_held_out_records_are_neither_linked_nor_traced(head: int) -> None:
    world = World(head=head, held_out=2).run_to(State.LINKED)
    held = {s.header.shard for p in world.parties.values() for s in p.shards if s.entry.held_out}
    assert len(held) == 2
    linked = world.linked()
    assert len(linked) == 19
    assert not held & {reference.shard for reference in linked}
    asked = world.question("trace", pictures(4, seed=0))
    answers = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"])
    key = world.run.vault.signing.public
    for envelope in answers.traces:
        trace = open_envelope(envelope, "trace", key, TraceStatement, step="test")
        assert trace.neighbours
        assert not held & {neighbour.record.shard for neighbour in trace.neighbours}


def measuring(world: World) -> list[tuple[int, torch.Tensor]]:
    """(epoch, rows) of the IRs of held-out records that came out."""
    heads = [c for c in world.host.log if c.head is not None and c.head.role == "eval-ir"]
    return [(c.head.epoch, c.tensors[0]) for c in heads if c.head is not None]


@FORMS
def test_the_records_are_measured_in_another_order_each_time(head: int) -> None:
    world = World(head=head, held_out=3, epochs=3).run_to(State.READY)
    orders = []
    for _ in range(3):
        world.train()
        pool = present(world.run.held_out)
        orders.append(pool.rows(0, pool.shape.records)[:, :12].tobytes())
    assert len(set(orders)) == 3
    assert {bytes(sorted(order)) for order in orders} == {bytes(sorted(orders[0]))}
    again = World(head=head, held_out=3, epochs=3).run_to(State.READY)
    again.train()
    pool = present(again.run.held_out)
    assert pool.rows(0, pool.shape.records)[:, :12].tobytes() != orders[0]  # of the operating system, not of the seed


@FORMS
def test_no_label_of_a_held_out_record_comes_out(head: int) -> None:
    world = World(head=head, held_out=3, epochs=1).run_to(State.READY)
    world.host.log.clear()
    world.train()
    world.host.serve()
    came_out = [c for c in world.host.log if c.way == "out"]
    first = next(i for i, c in enumerate(came_out) if c.head is not None and c.head.role == "eval-ir")
    assert [c.head.role for c in came_out[first:] if c.head is not None] == ["eval-ir"]
    (ir,) = next(c.tensors for c in came_out if c.head is not None and c.head.role == "eval-ir")
    assert (ir.shape, ir.dtype) == ((12, 4, 2, 2), torch.float32)
    pool = present(world.run.held_out)
    rows = pool.rows(0, pool.shape.records)
    labels = np.ascontiguousarray(rows[:, 12:16]).view("<u4").reshape(-1)
    sent = bytes(world.host.enclave_end.sent)
    assert set(labels.tolist()) == {0, 1, 2}
    assert not [kind for kind in (np.int64, np.int32, np.uint8) if labels.astype(kind).tobytes() in sent]


HOSTILE = {
    "NaN": (one_element(torch.nan), "tensor.malformed"),
    "too large": (changed(lambda x: x + 1e6), "tensor.malformed"),
    "another shape": (changed(lambda x: x[1:]), "tensor.malformed"),
    "a message": (message(m.Data(bytes(4))), "tensor.malformed"),
}


@FORMS
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_answer_of_the_center_stops_the_run_before_its_checkpoint(name: str, head: int) -> None:
    instead, code = HOSTILE[name]
    world = World(head=head, held_out=2).run_to(State.READY)
    tamper(world, "eval-out", instead, step=0)
    world.refused(m.Train(0), code)
    assert [e.body.get("epoch") for e in world.chain() if e.kind == "checkpoint"] == [None, 0]
    recovers(world)


# --- early stop -----------------------------------------------------------------------------------------------------


def losses_of(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Whatever the model is, these are its losses, epoch by epoch."""
    coming: Iterator[float] = iter(losses)
    monkeypatch.setattr(train_module, "measure", lambda _run: Measured(8, next(coming), 0.5, 0.5))


@FORMS
@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize(
    ("patience", "losses", "epochs"),
    [(1, [1.0, 1.0], 2), (2, [1.0, 0.9, 0.95, 0.97], 4), (2, [1.0, 1.1, 0.9, 0.91, 0.92], 5), (9, [1.0] * 6, 6)],
    ids=["no better", "two epochs no better", "better in between", "the plan's last epoch"],
)
def test_patience_ends_the_run_with_the_bits_of_so_many_epochs(
    head: int, kill: bool, patience: int, losses: list[float], epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_of(monkeypatch, losses)
    change = planned(schedule="constant", patience=patience)
    world = World(head=head, held_out=2, epochs=6, change=change).run_to(State.READY)
    while world.run.state is State.READY:
        world.train()
        if kill:  # what was best, and since when, is in the checkpoint
            world.take_up()
    assert (world.run.state, world.course.epoch) == (State.TRAINED, epochs)
    world.run_to(State.LINKED)
    assert same_bits(world, world.plain(world.run.seed, epochs=epochs))
    assert world.statement("model", ModelStatement).epochs == epochs


def test_without_patience_a_run_does_not_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    losses_of(monkeypatch, [1.0, 2.0, 3.0, 4.0])
    world = World(held_out=2, epochs=4, change=CONSTANT).run_to(State.TRAINED)
    assert world.course.epoch == 4


def test_patience_without_held_out_records_makes_no_manifest() -> None:
    world = World(change=planned(patience=1)).run_to(State.ENROLLING)
    for name in world.parties:
        world.done(world.provision(name))
    world.refused(m.MakeManifest(), "manifest.nothing-held-out")
    assert world.run.manifest is None
