"""A center that misbehaves, a host that asks out of order or changes the pool: stopped, and never for worse."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.tensors import Layout, TensorHead
from caltrain.enclave.run import State
from caltrain.errors import EnvironmentFault
from support.ends import frame
from support.recovery import planned, recovers
from support.tampering import Fields, Send, called, changed, message, one_element, tamper
from support.world import World

BATCH = 8

FAILED = EnvironmentFault("center.crashed", "the GPU is gone", step="center", fix="None.").diagnostics()
EVIL: dict[str, tuple[Send, str]] = {
    "no step of the optimiser would be this large": (changed(lambda t: t + 1e6), "tensor.malformed"),
    "two tensors": (lambda c, t, f: c.send_tensors([*t, *t], **f), "tensor.malformed"),
    "another shape of as many elements": (changed(lambda t: t.reshape(1, -1)), "tensor.malformed"),
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
    """Refused, with no more than the IRs of two steps out and no checkpoint written; the last one is still good."""
    kept = stored_checkpoints(world)
    world.refused(m.Train(0), code)
    assert [h.step for h in world.host.out() if h.role == "ir"] == [0, 1]
    assert (world.course.epoch, world.course.step) == (0, 1)
    assert stored_checkpoints(world) == kept
    recovers(world)


def stored_checkpoints(world: World) -> dict[str, bytes]:
    return {name: bytes(raw) for name, raw in world.host.storage.items() if name.startswith("checkpoint-")}


def head_bytes(**changes: Any) -> Callable[[World], bytes]:
    """A tensor frame for the IR gradient of step 1 with a head that `Channel` would not make."""

    def frame(world: World) -> bytes:
        fields: Fields = {
            "role": "ir-grad",
            "run": world.run.vault.run,
            "epoch": 0,
            "step": 1,
        }
        part: Fields = {"dtype": "f32", "shape": (BATCH, 4, 2, 2), "strides": (16, 4, 2, 1)}
        other = {name: value for name, value in changes.items() if name in part}
        layout = Layout(**(part | other))
        head = msgspec.msgpack.encode(TensorHead(**fields, parts=(layout,), slot=changes.get("slot")))
        return struct.pack("<I", len(head)) + head + bytes(4 * BATCH * 16)

    return frame


def send_raw(world: World, raw: bytes) -> None:
    """These bytes in place of the IR gradient of step 1."""
    tamper(world, "ir-grad", lambda *_: world.host.end.sendall(raw))


def tensor_frame_of(body: bytes) -> bytes:
    return frame(body, FrameKind.TENSOR)


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
    send_raw(world, tensor_frame_of(body))
    stops_in_step_1(world, "tensor.malformed")


def test_the_frame_that_these_are_made_from_is_taken() -> None:
    world = World(epochs=1).run_to(State.READY)
    body = head_bytes()(world)
    send_raw(world, tensor_frame_of(body))
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
    world.refused(m.Train(0), code)
    recovers(world)


# --- a host that asks out of order, or changes the pool -------------------------------------------------------------


@pytest.mark.parametrize(("done", "asked"), [(0, 1), (1, 0), (1, 2)], ids=["ahead", "again", "skipping"])
def test_an_epoch_that_is_not_next_stops_the_run_before_anything_comes_out(done: int, asked: int) -> None:
    world = World(epochs=3).run_to(State.READY)
    for _ in range(done):
        world.train()
    sent = len(world.host.enclave_end.sent)
    world.refused(m.Train(asked), "train.not-here")
    assert len(world.host.enclave_end.sent) == sent
    recovers(world)


@pytest.mark.parametrize(("done", "asked"), [(0, 1), (1, 0), (2, 0), (2, 1)], ids=["ahead", "again", "first", "second"])
def test_a_step_that_is_not_next_stops_the_run_before_anything_comes_out(done: int, asked: int) -> None:
    world = World(change=planned(steps=1)).run_to(State.READY)
    for _ in range(done):
        world.train()
    sent = len(world.host.enclave_end.sent)
    world.refused(m.Train(0, asked), "train.not-here")
    assert len(world.host.enclave_end.sent) == sent
    recovers(world)


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
    pool = bytes(world.host.storage["pool-0"])
    attack(world)
    world.refused(m.Train(0), code)
    assert not world.host.out()
    world.host.storage["pool-0"] = bytearray(pool)  # from a copy
    recovers(world)


def test_records_that_blow_up_the_front_stop_the_run_and_not_in_the_hosts_name() -> None:
    world = World(dtype="f32").run_to(State.READY)
    front = world.run.front
    assert front is not None
    for parameter in front.module.parameters():
        parameter.data.fill_(3e38)
    world.refused(m.Train(0), "train.overflow")
    assert [h for h in world.host.out() if h.role == "ir"] == []
