"""The enclave's end of the door: calls in bounded pieces, and no answer that is not the one that was due."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from caltrain.boundary.messages import (
    MAX_CHUNK,
    REPLIES_AND_CALLS,
    CallFailed,
    CommitCenter,
    Data,
    Message,
    Progress,
    Read,
    ShowCenter,
    Write,
)
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
        lambda door: door.commit_center(0, 1),
        lambda door: door.show_center(0, 1, limit=100),
        lambda door: door.read_all("a", limit=10),
    ],
)
def test_what_the_host_could_not_do_is_raised_as_it_reports_it(call: Callable[[Door], object]) -> None:
    host = MemoryHost()
    host.on_read = lambda _call: CallFailed(FULL)
    host.on_write = lambda _call: CallFailed(FULL)
    host.on_commit = lambda _call: CallFailed(FULL)
    host.on_show = lambda _call: CallFailed(FULL)
    with pytest.raises(EnvironmentFault, match=r"^storage\.full: the disk is full"):
        call(Door(host.enclave_channel))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_commitment_is_32_bytes(size: int) -> None:
    host = MemoryHost()
    door = Door(host.enclave_channel)
    host.on_commit = lambda _call: Data(pattern(32))
    assert door.commit_center(5, 7) == pattern(32)
    assert door.commit_center(6, 0, durable=True) == pattern(32)
    assert calls(host) == [CommitCenter(5, 7), CommitCenter(6, 0, durable=True)]
    host.on_commit = lambda _call: Data(bytes(size))
    with pytest.raises(ProtocolError, match=rf"^center\.no-commitment: .*{size} bytes"):
        door.commit_center(5, 7)


@pytest.mark.parametrize("size", [0, 7, 9, 32])
def test_the_length_of_a_shown_center_is_8_bytes(size: int) -> None:
    host = MemoryHost()
    host.on_show = lambda _call: Data(bytes(size))
    with pytest.raises(ProtocolError, match=rf"^center\.no-commitment: .*{size} bytes"):
        Door(host.enclave_channel).show_center(5, 7, limit=100)


@pytest.mark.parametrize("length", [101, 1 << 32, (1 << 64) - 1])
def test_a_shown_center_beyond_the_limit_is_not_read(length: int) -> None:
    host = MemoryHost()
    host.on_show = lambda _call: Data(length.to_bytes(8, "big"))
    with pytest.raises(ProtocolError, match=rf"^center\.too-large: a CenterNet of {length} bytes"):
        Door(host.enclave_channel).show_center(5, 7, limit=100)
    assert calls(host) == [ShowCenter(5, 7)]


def test_a_shown_center_up_to_the_limit_is_read() -> None:
    host = MemoryHost()
    host.storage["center-state"] = bytearray(pattern(120))
    host.on_show = lambda _call: Data((100).to_bytes(8, "big"))
    assert Door(host.enclave_channel).show_center(5, 7, limit=100) == pattern(100)


@pytest.mark.parametrize("size", [0, 1, 10])
def test_a_whole_object_is_read_up_to_the_limit(size: int) -> None:
    host = MemoryHost()
    host.storage["a"] = bytearray(pattern(size))
    assert Door(host.enclave_channel).read_all("a", limit=10) == pattern(size)


def test_a_whole_object_of_many_chunks_is_read() -> None:
    host = MemoryHost()
    host.storage["a"] = bytearray(pattern(2 * MAX_CHUNK + 5))
    assert Door(host.enclave_channel).read_all("a", limit=3 * MAX_CHUNK) == pattern(2 * MAX_CHUNK + 5)


def test_an_object_without_end_is_refused_at_the_limit() -> None:
    host = MemoryHost()
    host.on_read = lambda call: Data(bytes(call.length))
    with pytest.raises(ProtocolError, match=r"^storage\.too-long: "):
        Door(host.enclave_channel).read_all("a", limit=2 * MAX_CHUNK)
    assert len(calls(host)) == 3


def test_storage_has_a_stream_of_its_own_where_there_is_one() -> None:
    host, center = MemoryHost(), MemoryHost()
    center.on_commit = lambda _call: Data(pattern(32))
    door = Door(center.enclave_channel, host.enclave_channel)
    door.write("a", b"bytes", offset=0)
    assert door.read("a", offset=0, length=5) == b"bytes"
    assert door.commit_center(1, 2) == pattern(32)
    assert [type(call) for call in calls(host)] == [Write, Read]
    assert [type(call) for call in calls(center)] == [CommitCenter]
    assert door.reads_ahead
    assert not Door(host.enclave_channel).reads_ahead


def test_progress_is_told_and_not_answered() -> None:
    with ends() as (host, enclave):
        Door(enclave).progress("train", 3, 10, loss=0.5)
        assert host.receive(REPLIES_AND_CALLS) == Progress("train", 3, 10, 0.5)


def test_a_tensor_in_answer_to_a_call_is_refused() -> None:
    with ends() as (host, enclave):
        host.send_tensors([torch.ones(1)], role="loss", run=RUN, epoch=0, step=0)
        with pytest.raises(ProtocolError, match=r"^door\.unexpected: "):
            Door(enclave).read("a", offset=0, length=1)
