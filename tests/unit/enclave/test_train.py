"""Training: the plain loop bit for bit, no label or logit outside in ternary form, no center that misbehaves."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.frames import FrameKind, send_frame
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.digests import to_raw, to_text
from caltrain.enclave.run import State, present
from caltrain.errors import EnvironmentFault
from caltrain.models.spec import Partition
from caltrain.models.weights import model_digest, state_of
from caltrain.plan import Plan
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds, epoch_order
from support.world import World

STEPS, BATCH = 3, 8  # of 27 records three are left out of each epoch
Fields = dict[str, Any]


def same_bits(world: World, other: torch.nn.Module) -> bool:
    """Whether the linked model has the weights of `other`, bit for bit."""
    ours, theirs = state_of(present(world.run.model)), state_of(other)
    assert set(ours) == set(theirs)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


# --- the honest run -------------------------------------------------------------------------------------------------


def cut_at_input(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, partition=Partition(front=0, head=1, unsafe_cut_at_input=True))


def plainest(plan: Plan) -> Plan:
    training = msgspec.structs.replace(plan.training, channels_last=False, schedule="constant", batch=5)
    return msgspec.structs.replace(plan, training=training)


WORLDS: dict[str, Callable[[], World]] = {
    "two-way": lambda: World(head=0),
    "ternary, HeadNet of the last layer": lambda: World(head=1),
    "ternary, HeadNet of two layers": lambda: World(head=2),
    "ternary, of floats": lambda: World(dtype="f32", epochs=3),
    "two-way, of floats": lambda: World(head=0, dtype="f32", epochs=3),
    "cut at the input": lambda: World(change=cut_at_input),
    "another layout, batch and schedule": lambda: World(change=plainest),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_weights_are_those_of_the_plain_loop_bit_for_bit(name: str) -> None:
    world = WORLDS[name]().run_to(State.RELEASED)
    assert same_bits(world, world.plain(world.run.seed))


@pytest.mark.parametrize("head", [0, 2], ids=["two-way", "ternary"])
def test_the_loss_of_each_epoch_is_that_of_the_plain_loop(head: int) -> None:
    world = World(head=head).run_to(State.READY)
    told = [world.train() for _ in range(2)]
    pixels, labels = world.data()
    plan, losses = world.plan, []
    train_plain(
        plan.model,
        plan.partition,
        plan.data,
        plan.training,
        pixels=pixels,
        labels=labels,
        seeds=world.run.seeds,
        on_epoch=lambda _epoch, loss: losses.append(loss),
    )
    assert [(reply.loss, reply.images) for reply in told] == [(loss, STEPS * BATCH) for loss in losses]
    noted = [event.body for event in world.chain() if event.kind == "epoch"]
    assert noted == [{"epoch": i, "loss": f"{loss:.6f}", "records": 24} for i, loss in enumerate(losses)]


@pytest.mark.parametrize("what", ["a record", "a label", "the seed", "a gradient"])
def test_the_comparison_notices_the_smallest_change(what: str) -> None:
    world = World(records=8).run_to(State.READY)  # no record is left out of an epoch
    if what == "a gradient":
        tamper(world, "ir-grad", lambda channel, tensor, fields: channel.send_tensor(tensor * 1.001, **fields))
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
    assert {(h.role, (h.shape, h.dtype)) for h in world.host.out()} == {(role, shapes[role]) for role in roles}
    assert {h.run for h in world.host.out()} == {world.run.vault.run}


def test_in_ternary_form_no_label_and_no_logit_comes_out() -> None:
    world = World().run_to(State.READY)
    logits: list[bytes] = []
    head = present(world.run.head).module
    head.register_forward_hook(lambda _module, _inputs, out: logits.append(out.detach().numpy().tobytes()))
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


def test_both_sides_are_committed_to_after_each_epoch() -> None:
    world = World().run_to(State.READY)
    commitments = []
    for _ in range(2):
        world.train()
        commitments.append(to_text(world.host.the_center.commitment()))
    noted = [event.body for event in world.chain() if event.kind == "checkpoint"]
    assert [(body["epoch"], body["center"]) for body in noted] == list(enumerate(commitments))
    assert world.run.center_commitment == to_raw(commitments[-1])
    assert noted[0]["inside"] != noted[1]["inside"]
    # A guess of the inner weights cannot be confirmed with it.
    inner = state_of(present(world.run.front).module, present(world.run.head).module)
    assert model_digest(world.plan.model, inner) != noted[1]["inside"]


def test_progress_is_told_step_by_step() -> None:
    world = World(epochs=1).run_to(State.TRAINED)
    told = [c.message for c in world.host.log if isinstance(c.message, m.Progress) and c.message.phase == "train"]
    assert [(p.done, p.total) for p in told] == [(1, 3), (2, 3), (3, 3)]
    assert f"{told[-1].loss:.6f}" == next(e.body["loss"] for e in world.chain() if e.kind == "epoch")


# --- a center that misbehaves ---------------------------------------------------------------------------------------

Send = Callable[[Channel, Tensor, Fields], None]


class Tampering(Channel):
    """The host's channel, but one role of step 1 is sent by `instead`."""

    def __init__(self, channel: Channel, role: str, instead: Send) -> None:
        self.channel, self.role, self.instead = channel, role, instead

    def send_tensor(self, tensor: Tensor, **fields: Any) -> None:
        if (fields["role"], fields["step"]) == (self.role, 1):
            self.instead(self.channel, tensor, fields)
        else:
            self.channel.send_tensor(tensor, **fields)


def tamper(world: World, role: str, instead: Send) -> None:
    host = world.host
    host.on_tensor = lambda head, tensor, channel: host.take(head, tensor, Tampering(channel, role, instead))


def changed(change: Callable[[Tensor], Tensor]) -> Send:
    return lambda channel, tensor, fields: channel.send_tensor(change(tensor), **fields)


def called(**other: Any) -> Send:
    return lambda channel, tensor, fields: channel.send_tensor(tensor, **(fields | other))


def one_element(value: float) -> Send:
    def poison(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[(0,) * tensor.dim()] = value
        return tensor

    return changed(poison)


def message(answer: m.Message) -> Send:
    return lambda channel, _tensor, _fields: channel.send(answer)


FAILED = EnvironmentFault("center.crashed", "the GPU is gone", step="center", fix="None.").diagnostics()
EVIL: dict[str, tuple[Send, str]] = {
    "a record less": (changed(lambda t: torch.cat((t, t))), "tensor.malformed"),
    "another number of dimensions": (changed(lambda t: t[None]), "tensor.malformed"),
    "whole numbers": (changed(lambda t: t.long()), "tensor.malformed"),
    "NaN": (one_element(torch.nan), "tensor.malformed"),
    "infinity": (one_element(torch.inf), "tensor.malformed"),
    "minus infinity": (one_element(-torch.inf), "tensor.malformed"),
    "another role": (called(role="labels"), "door.unexpected"),
    "another step": (called(step=0), "door.unexpected"),
    "another epoch": (called(epoch=1), "door.unexpected"),
    "another run": (called(run="0" * 32), "door.unexpected"),
    "data": (message(m.Data(bytes(64))), "tensor.malformed"),
    "a request": (message(m.Stop()), "door.unexpected"),
    "a reply": (message(m.Done()), "door.unexpected"),
    "the host's own failure": (message(m.CallFailed(FAILED)), "center.crashed"),
    "the end of the stream": (lambda channel, _tensor, _fields: channel.close(), "door.closed"),
}
DUE = [(0, "loss"), (0, "ir-grad"), (2, "center-out"), (2, "ir-grad")]


@pytest.mark.parametrize(("head", "role"), DUE)
@pytest.mark.parametrize("name", EVIL)
def test_what_is_not_the_tensor_that_is_due_stops_the_run(name: str, head: int, role: str) -> None:
    instead, code = EVIL[name]
    world = World(head=head).run_to(State.READY)
    if name == "the end of the stream":
        instead = lambda *_: world.host.end.close()  # noqa: E731
    tamper(world, role, instead)
    stops_in_step_1(world, code)


def stops_in_step_1(world: World, code: str) -> None:
    world.refused(m.TrainEpoch(0), code)
    assert [h.step for h in world.host.out() if h.role == "ir"] == [0, 1]
    assert world.run.epoch == 0
    assert world.run.center_commitment == b""


def head_bytes(**changes: Any) -> Callable[[World], bytes]:
    """A tensor frame for the IR gradient of step 1 with a head that `Channel` would not make."""

    def frame(world: World) -> bytes:
        fields: Fields = {
            "role": "ir-grad",
            "run": world.run.vault.run,
            "epoch": 0,
            "step": 1,
            "dtype": "f32",
            "shape": (BATCH, 4, 2, 2),
            "strides": (16, 4, 2, 1),
        }
        head = msgspec.msgpack.encode(TensorHead(**(fields | changes)))
        return struct.pack("<I", len(head)) + head + bytes(4 * BATCH * 16)

    return frame


RAW: dict[str, Callable[[World], bytes]] = {
    "strides that overlap": head_bytes(strides=(0, 4, 2, 1)),
    "strides with gaps": head_bytes(strides=(32, 4, 2, 1)),
    "strides beyond the data": head_bytes(strides=(1 << 40, 4, 2, 1)),
    "too few strides": head_bytes(strides=(4, 2, 1)),
    "an empty dimension": head_bytes(shape=(BATCH, 4, 2, 0)),
    "more elements than bytes": head_bytes(shape=(BATCH + 1, 4, 2, 2)),
    "another element size": head_bytes(dtype="i64"),
    "a slot of a ring that is not there": head_bytes(slot=0),
    "no head": lambda _world: b"\0",
    "a head that is longer than the frame": lambda _world: struct.pack("<I", 1 << 31) + b"xx",
    "a head that is none": lambda _world: struct.pack("<I", 3) + b"\xff\xff\xff",
}


@pytest.mark.parametrize("name", RAW)
def test_a_tensor_that_is_not_what_its_head_says_stops_the_run(name: str) -> None:
    world = World().run_to(State.READY)
    body = RAW[name](world)
    tamper(world, "ir-grad", lambda *_: send_frame(world.host.end, FrameKind.TENSOR, body))  # type: ignore[arg-type]
    stops_in_step_1(world, "tensor.malformed")


def test_the_frame_that_these_are_made_from_is_taken() -> None:
    world = World(epochs=1).run_to(State.READY)
    body = head_bytes()(world)
    tamper(world, "ir-grad", lambda *_: send_frame(world.host.end, FrameKind.TENSOR, body))  # type: ignore[arg-type]
    world.run_to(State.TRAINED)


@pytest.mark.parametrize(
    "raw", [b"\0\0\0\0\1", b"\xff\xff\xff\xff\2", b"\2\0\0\0\7x"], ids=["empty", "4 GiB", "kind 7"]
)
def test_a_malformed_frame_stops_the_run(raw: bytes) -> None:
    world = World().run_to(State.READY)
    tamper(world, "ir-grad", lambda *_: world.host.end.sendall(raw))
    stops_in_step_1(world, "frame.malformed")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (m.Data(bytes(31)), "center.no-commitment"),
        (m.Data(bytes(33)), "center.no-commitment"),
        (m.Data(), "center.no-commitment"),
        (m.CallFailed(FAILED), "center.crashed"),
    ],
)
def test_a_host_that_commits_to_no_center_stops_the_run(answer: m.Answer, code: str) -> None:
    world = World().run_to(State.READY)
    world.host.on_commit = lambda _call: answer
    world.refused(m.TrainEpoch(0), code)


# --- a host that asks out of order, or changes the pool -------------------------------------------------------------


@pytest.mark.parametrize(("done", "asked"), [(0, 1), (1, 0), (1, 2)], ids=["ahead", "again", "skipping"])
def test_an_epoch_that_is_not_next_stops_the_run_before_anything_comes_out(done: int, asked: int) -> None:
    world = World(epochs=3).run_to(State.READY)
    for _ in range(done):
        world.train()
    sent = len(world.host.enclave_end.sent)
    world.refused(m.TrainEpoch(asked), "train.other-epoch")
    assert len(world.host.enclave_end.sent) == sent


def flip(world: World) -> None:
    world.host.storage["pool-0"][100] ^= 1


def cut(world: World) -> None:
    del world.host.storage["pool-0"][-1:]


def lose(world: World) -> None:
    del world.host.storage["pool-0"]


def give_the_old_order(world: World) -> None:
    honest = world.host.read
    world.host.on_read = lambda call: honest(msgspec.structs.replace(call, name="pool-0"))


def give_more(world: World) -> None:
    world.host.on_read = lambda call: m.Data(bytes(world.host.storage[call.name]) + b"\0")


POOL: dict[str, tuple[Callable[[World], None], str]] = {
    "a bit flipped": (flip, "sealed.not-authentic"),
    "cut short": (cut, "storage.short"),
    "gone": (lose, "storage.missing"),
    "the order of the epoch before": (give_the_old_order, "sealed.not-authentic"),
    "more than was asked for": (give_more, "storage.short"),
}


@pytest.mark.parametrize("name", POOL)
def test_a_pool_that_is_not_as_it_was_written_stops_the_run(name: str) -> None:
    attack, code = POOL[name]
    world = World().run_to(State.READY)
    attack(world)
    world.refused(m.TrainEpoch(0), code)
    assert not world.host.out()


def test_records_that_blow_up_the_front_stop_the_run_and_not_in_the_hosts_name() -> None:
    world = World(dtype="f32").run_to(State.READY)
    front = world.run.front
    assert front is not None
    for parameter in front.module.parameters():
        parameter.data.fill_(3e38)
    world.refused(m.TrainEpoch(0), "train.overflow")
    assert [h for h in world.host.out() if h.role == "ir"] == []
