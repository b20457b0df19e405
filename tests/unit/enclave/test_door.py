"""The enclave's end of the door: calls in bounded pieces, and no answer that is not the one that was due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import (
    MAX_CHUNK,
    REPLIES_AND_CALLS,
    Answer,
    CallFailed,
    CommitCenter,
    Data,
    Message,
    Progress,
    Read,
    Write,
)
from caltrain.boundary.tensors import Role
from caltrain.enclave.door import Door
from caltrain.errors import EnvironmentFault, ProtocolError
from support.ends import ends
from support.memory_host import MemoryHost

RUN = "ab" * 16
FULL = EnvironmentFault("storage.full", "the disk is full", step="write", fix="Free space.").diagnostics()


def calls(host: MemoryHost) -> list[Message]:
    return [crossing.message for crossing in host.log if crossing.way == "out" and crossing.message is not None]


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


# --- storage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, MAX_CHUNK, MAX_CHUNK + 1, 2 * MAX_CHUNK + 5])
def test_what_was_written_is_read_back_in_pieces_of_at_most_a_chunk(size: int) -> None:
    host, data = MemoryHost(), pattern(size)
    door = Door(host.enclave_channel)
    door.write("a/b", data, offset=3)
    assert door.read("a/b", offset=3, length=size) == data
    sizes = [len(c.data) if isinstance(c, Write) else c.length for c in calls(host) if isinstance(c, Write | Read)]
    pieces = [min(MAX_CHUNK, size - start) for start in range(0, size, MAX_CHUNK)]
    assert sizes == pieces * 2


def test_nothing_is_asked_for_no_bytes() -> None:
    host = MemoryHost()
    door = Door(host.enclave_channel)
    door.write("a", b"", offset=0)
    assert door.read("a", offset=0, length=0) == b""
    assert calls(host) == []


def test_a_host_that_gives_less_at_a_time_is_asked_again() -> None:
    host = MemoryHost()
    host.storage["a"] = bytearray(pattern(100))
    host.on_read = lambda call: Data(bytes(host.storage["a"][call.offset : call.offset + 7]))
    assert Door(host.enclave_channel).read("a", offset=1, length=70) == pattern(100)[1:71]


@pytest.mark.parametrize("held", [0, 9, 10])
def test_an_object_that_ends_early_is_refused(held: int) -> None:
    host = MemoryHost()
    host.storage["a"] = bytearray(held)
    with pytest.raises(ProtocolError, match=rf"^storage\.short: the host's copy of a ends at byte {held}"):
        Door(host.enclave_channel).read("a", offset=0, length=11)


def test_more_bytes_than_were_asked_for_are_refused() -> None:
    host = MemoryHost()
    host.on_read = lambda call: Data(bytes(call.length + 1))
    with pytest.raises(ProtocolError, match=r"^storage\.short: "):
        Door(host.enclave_channel).read("a", offset=0, length=10)


def test_reading_up_to_a_length_ends_with_the_object_and_never_exceeds_it() -> None:
    host = MemoryHost()
    host.storage["a"] = bytearray(pattern(10))
    door = Door(host.enclave_channel)
    assert door.read_up_to("a", offset=4, length=100) == pattern(10)[4:]
    assert door.read_up_to("a", offset=10, length=100) == b""
    assert door.read_up_to("a", offset=0, length=10 * MAX_CHUNK) == pattern(10)
    host.on_read = lambda call: Data(bytes(call.length + 1))
    assert len(door.read_up_to("a", offset=0, length=5)) == 5


@pytest.mark.parametrize(
    "call",
    [
        lambda door: door.read("a", offset=0, length=1),
        lambda door: door.read_up_to("a", offset=0, length=1),
        lambda door: door.write("a", b"x", offset=0),
        lambda door: door.commit_center(0),
    ],
)
def test_what_the_host_could_not_do_is_raised_as_it_reports_it(call: Callable[[Door], object]) -> None:
    host = MemoryHost()
    host.on_read = lambda _call: CallFailed(FULL)
    host.on_write = lambda _call: CallFailed(FULL)
    host.on_commit = lambda _call: CallFailed(FULL)
    with pytest.raises(EnvironmentFault, match=r"^storage\.full: the disk is full"):
        call(Door(host.enclave_channel))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_commitment_is_32_bytes(size: int) -> None:
    host = MemoryHost()
    door = Door(host.enclave_channel)
    host.on_commit = lambda _call: Data(pattern(32))
    assert door.commit_center(5) == pattern(32)
    assert calls(host) == [CommitCenter(5)]
    host.on_commit = lambda _call: Data(bytes(size))
    with pytest.raises(ProtocolError, match=rf"^center\.no-commitment: .*{size} bytes"):
        door.commit_center(5)


def test_progress_is_told_and_not_answered() -> None:
    with ends() as (host, enclave):
        Door(enclave).progress("train", 3, 10, loss=0.5)
        assert host.receive(REPLIES_AND_CALLS) == Progress("train", 3, 10, 0.5)


def test_a_tensor_in_answer_to_a_call_is_refused() -> None:
    with ends() as (host, enclave):
        host.send_tensor(torch.ones(1), role="loss", run=RUN, epoch=0, step=0)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
            Door(enclave).read("a", offset=0, length=1)


# --- tensors ---------------------------------------------------------------------------------------------------


def answer(
    host: Channel, tensor: Tensor, *, role: Role = "ir-grad", run: str = RUN, epoch: int = 1, step: int = 2
) -> None:
    host.send_tensor(tensor, role=role, run=run, epoch=epoch, step=step)


def exchange(enclave: Channel, outgoing: dict[Role, Tensor] | None = None) -> Tensor:
    return Door(enclave).exchange(outgoing or {}, due="ir-grad", shape=(2, 3), run=RUN, epoch=1, step=2)


@pytest.mark.parametrize("slot_bytes", [None, 24, 8])
def test_tensors_go_out_in_order_and_the_one_that_is_due_comes_in(slot_bytes: int | None) -> None:
    with ends(slot_bytes=slot_bytes) as (host, enclave):
        answer(host, torch.arange(6.0).reshape(2, 3))
        got = exchange(enclave, {"ir": torch.ones(2, 2), "labels": torch.tensor([3, 4])})
        assert torch.equal(got, torch.arange(6.0).reshape(2, 3))
        sent: list[Any] = [host.receive_any(REPLIES_AND_CALLS) for _ in range(2)]
    assert [(h.role, h.run, h.epoch, h.step) for h, _ in sent] == [("ir", RUN, 1, 2), ("labels", RUN, 1, 2)]
    assert torch.equal(sent[0][1], torch.ones(2, 2))
    assert torch.equal(sent[1][1], torch.tensor([3, 4]))


def spoilt(value: float) -> Tensor:
    tensor = torch.zeros(2, 3)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        spoilt(float("nan")),
        spoilt(float("inf")),
        spoilt(float("-inf")),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(1, 2, 3),
        torch.zeros(2, 4),
        torch.zeros((2, 3), dtype=torch.int64),
    ],
    ids=lambda t: f"{tuple(t.shape)} {t.dtype} {t.sum()}",
)
@pytest.mark.parametrize("slot_bytes", [None, 64])
def test_a_tensor_that_is_not_finite_float32_of_the_due_shape_is_refused(
    tensor: Tensor, slot_bytes: int | None
) -> None:
    with ends(slot_bytes=slot_bytes) as (host, enclave):
        answer(host, tensor)
        with pytest.raises(ProtocolError, match=r"^tensor\.malformed: .*expected finite float32 of \(2, 3\)"):
            exchange(enclave)


@pytest.mark.parametrize(
    "place", [{"role": "center-out"}, {"run": "cd" * 16}, {"epoch": 0}, {"step": 1}, {"step": 3}], ids=str
)
def test_a_tensor_of_another_place_is_refused(place: dict[str, Any]) -> None:
    with ends() as (host, enclave):
        answer(host, torch.zeros(2, 3), **place)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
            exchange(enclave)


@pytest.mark.parametrize(
    ("instead", "error"),
    [
        (CallFailed(FULL), r"^storage\.full: the disk is full"),
        (Data(bytes(24)), r"^tensor\.malformed: .*data where a tensor was due"),
        (CallFailed({}), r"^protocol\.unreadable-error: "),
    ],
    ids=["failure", "data", "unreadable failure"],
)
def test_a_message_in_place_of_the_tensor_is_an_error(instead: Answer, error: str) -> None:
    with ends() as (host, enclave):
        host.send(instead)
        with pytest.raises((ProtocolError, EnvironmentFault), match=error):
            exchange(enclave)
