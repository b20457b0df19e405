"""The ring: memory that cannot shrink, slots that cannot be left, and copies that nobody changes afterwards."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import ANSWERS
from caltrain.boundary.ring import SLOTS, Ring, Side, create_ring_memory
from caltrain.boundary.tensors import Layout, TensorHead
from caltrain.errors import EnvironmentFault, ProtocolError
from support.ends import ends, hear, rings, sockets, tensor_frame

RUN = "ab" * 16
SLOT = 64


def receive(channel: Channel, *, step: int = 0) -> Tensor:
    got = channel.receive_tensors(role="ir", run=RUN, epoch=0, step=step, or_message=ANSWERS)
    assert isinstance(got, tuple)
    (tensor,) = got
    return tensor


def send(channel: Channel, tensor: Tensor, *, step: int = 0) -> None:
    channel.send_tensors([tensor], role="ir", run=RUN, epoch=0, step=step)


# --- the memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2 * SLOTS * SLOT - 1, 2 * SLOTS * SLOT + 1])
def test_the_memory_can_neither_shrink_nor_grow(size: int) -> None:
    fd = create_ring_memory(SLOT)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(fd).st_size == 2 * SLOTS * SLOT
    finally:
        os.close(fd)


def test_the_memory_is_not_inherited_by_programs_that_are_started() -> None:
    fd = create_ring_memory(SLOT)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_no_memory_is_a_named_error_and_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def full(fd: int, _size: int) -> None:
        made.append(fd)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(EnvironmentFault, match=r"^ring\.no-memory: .*No space left"):
        create_ring_memory(SLOT)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])


def memory(seals: int, size: int = 2 * SLOTS * SLOT) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


GROW, SHRINK, SEAL = fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL
UNFIT: dict[str, Callable[[], int]] = {
    "not sealed": lambda: memory(0),
    "may shrink": lambda: memory(GROW | SEAL),
    "may grow": lambda: memory(SHRINK | SEAL),
    "seals may be added": lambda: memory(GROW | SHRINK),
    "too small": lambda: memory(GROW | SHRINK | SEAL, 2 * SLOTS * SLOT - 1),
    "too large": lambda: memory(GROW | SHRINK | SEAL, 2 * SLOTS * SLOT + 4096),
}


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT)
def test_memory_of_another_size_or_without_its_seals_is_refused(make: Callable[[], int]) -> None:
    fd = make()
    try:
        with pytest.raises(ProtocolError, match=r"^ring\.not-sealed: "):
            Ring(fd, slot_bytes=SLOT, side=Side.ENCLAVE)
    finally:
        os.close(fd)


def test_a_file_in_place_of_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * SLOTS * SLOT))
    with path.open("r+b") as file, pytest.raises(ProtocolError, match=r"^ring\.not-sealed: "):
        Ring(file.fileno(), slot_bytes=SLOT, side=Side.ENCLAVE)


@pytest.mark.parametrize("slot_bytes", [0, -1])
def test_a_ring_without_room_is_refused(slot_bytes: int) -> None:
    fd = memory(GROW | SHRINK | SEAL, 0)
    try:
        with pytest.raises(ProtocolError, match=r"^ring\.not-sealed: "):
            Ring(fd, slot_bytes=slot_bytes, side=Side.ENCLAVE)
    finally:
        os.close(fd)


# --- the slots -------------------------------------------------------------------------------------------------


def test_every_slot_of_both_sides_is_a_place_of_its_own() -> None:
    with rings(SLOT) as (host, enclave):
        for mark in range(SLOTS):
            assert host.put([memoryview(bytes([mark]) * SLOT)]) == mark
            assert enclave.put([memoryview(bytes([100 + mark]) * SLOT)]) == mark
        for mark in range(SLOTS):
            assert bytes(enclave.view(mark, SLOT)) == bytes([mark]) * SLOT
            assert bytes(host.view(mark, SLOT)) == bytes([100 + mark]) * SLOT
        assert host.put([memoryview(b"x")]) == 0, "the slots take turns"


def test_parts_lie_one_after_the_other_and_what_was_there_before_stays_behind_them() -> None:
    with rings(SLOT) as (host, enclave):
        for mark in b"\xee\xee":
            host.put([memoryview(bytes([mark]) * SLOT)])
        assert host.put([memoryview(b"abc"), memoryview(b""), memoryview(b"de")]) == 0
        assert bytes(enclave.view(0, SLOT)) == b"abcde" + b"\xee" * (SLOT - 5)
        assert bytes(enclave.view(1, SLOT)) == b"\xee" * SLOT
        assert host.put([]) == 1, "nothing takes its turn too"
        assert bytes(enclave.view(1, SLOT)) == b"\xee" * SLOT


@pytest.mark.parametrize("length", [0, 1, SLOT])
def test_a_view_is_as_long_as_announced(length: int) -> None:
    with rings(SLOT) as (_, enclave):
        assert len(enclave.view(SLOTS - 1, length)) == length


@pytest.mark.parametrize(("slot", "length"), [(-1, 1), (SLOTS, 1), (255, 1), (0, -1), (0, SLOT + 1), (0, 1 << 62)])
def test_a_slot_or_a_length_outside_the_ring_is_refused(slot: int, length: int) -> None:
    with rings(SLOT) as (_, enclave), pytest.raises(ProtocolError, match=r"^ring\.out-of-range: "):
        enclave.view(slot, length)


# --- through the channel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, SLOT // 4 - 1, SLOT // 4])
def test_a_tensor_that_fits_goes_through_the_ring_and_not_through_the_stream(elements: int) -> None:
    sent = torch.full((elements,), 3.14159)
    with sockets() as (wire, far), rings(SLOT) as (host_ring, enclave_ring):
        send(Channel(far, host_ring), sent)
        stream = wire.recv(4096)
        assert sent[:1].numpy().tobytes() not in stream
        far.sendall(stream)
        assert torch.equal(receive(Channel(wire, enclave_ring)), sent)


def test_a_tensor_larger_than_a_slot_goes_inline_and_leaves_the_ring_alone() -> None:
    sent = torch.arange(SLOT // 4 + 1, dtype=torch.float32)
    with sockets() as (near, far), rings(SLOT) as (host_ring, enclave_ring):
        send(Channel(near, host_ring), sent)
        assert torch.equal(receive(Channel(far, enclave_ring)), sent)
        assert bytes(enclave_ring.view(0, SLOT)) + bytes(enclave_ring.view(1, SLOT)) == bytes(2 * SLOT)
        assert host_ring.put([memoryview(b"")]) == 0


@pytest.mark.parametrize("sizes", [(4, 4, 8), (15, 1), (1,) * 16])
def test_tensors_that_fit_together_share_a_slot(sizes: tuple[int, ...]) -> None:
    sent = [torch.full((size,), float(i)) for i, size in enumerate(sizes)]
    with sockets() as (wire, far), rings(SLOT) as (host_ring, enclave_ring):
        Channel(far, host_ring).send_tensors(sent, role="ir", run=RUN, epoch=0, step=0)
        stream = wire.recv(1 << 16)
        assert struct.unpack_from("<I", stream)[0] == len(stream) - 4
        assert b"".join(x.numpy().tobytes() for x in sent) not in stream
        far.sendall(stream)
        got = Channel(wire, enclave_ring).receive_tensors(role="ir", run=RUN, epoch=0, step=0, or_message=ANSWERS)
        assert isinstance(got, tuple)
        assert len(got) == len(sent)
        assert all(torch.equal(a, b) for a, b in zip(got, sent, strict=True))
        assert host_ring.put([]) == 1, "one slot was taken for all of them"


def test_tensors_that_fit_alone_but_not_together_go_inline() -> None:
    sent = [torch.ones(SLOT // 4), torch.zeros(1)]
    with sockets() as (near, far), rings(SLOT) as (host_ring, enclave_ring):
        Channel(near, host_ring).send_tensors(sent, role="ir", run=RUN, epoch=0, step=0)
        got = Channel(far, enclave_ring).receive_tensors(role="ir", run=RUN, epoch=0, step=0, or_message=ANSWERS)
        assert isinstance(got, tuple)
        assert all(torch.equal(a, b) for a, b in zip(got, sent, strict=True))
        assert host_ring.put([]) == 0


def test_both_directions_and_both_slots_carry_tensors_at_once() -> None:
    with ends(slot_bytes=SLOT) as (host, enclave):
        for step in range(SLOTS):
            send(host, torch.full((4,), step + 1.0), step=step)
            send(enclave, torch.full((2, 2), step + 11.0), step=step)
        for step in range(SLOTS):
            assert torch.equal(receive(enclave, step=step), torch.full((4,), step + 1.0))
            assert torch.equal(receive(host, step=step), torch.full((2, 2), step + 11.0))


def test_memory_changed_after_the_copy_does_not_change_the_received_tensor() -> None:
    with sockets() as (near, far), rings(SLOT) as (host_ring, enclave_ring):
        send(Channel(near, host_ring), torch.ones(4))
        got = receive(Channel(far, enclave_ring))
        seen = enclave_ring.view(0, 16)
        for _ in range(SLOTS):
            host_ring.put([memoryview(torch.full((4,), float("nan")).numpy().tobytes())])
        assert bytes(seen) != torch.ones(4).numpy().tobytes(), "the memory is shared: the attack took place"
        assert torch.equal(got, torch.ones(4))


def in_slot(elements: int) -> TensorHead:
    return TensorHead("ir", RUN, 0, 0, (Layout("f32", (elements,), (1,)),), slot=0)


def together(*elements: int) -> TensorHead:
    return TensorHead("ir", RUN, 0, 0, tuple(Layout("f32", (size,), (1,)) for size in elements), slot=0)


def test_a_head_that_names_a_slot_brings_what_lies_in_it() -> None:
    with rings(SLOT) as (host_ring, enclave_ring):
        host_ring.put([memoryview(torch.arange(4.0).numpy().tobytes())])
        got = hear(tensor_frame(in_slot(4), b""), ANSWERS, ring=enclave_ring)
    assert isinstance(got, tuple)
    assert torch.equal(got[1][0], torch.arange(4.0))


@pytest.mark.parametrize(
    ("head", "inline", "code"),
    [
        (in_slot(SLOT // 4 + 1), b"", "ring.out-of-range"),
        (in_slot(1 << 40), b"", "ring.out-of-range"),
        (in_slot(0), b"", "tensor.malformed"),
        (in_slot(1), b"more", "tensor.malformed"),
        (together(1, SLOT // 4), b"", "ring.out-of-range"),
        (together(1 << 40, 1 << 40), b"", "ring.out-of-range"),
        (together(4, 0), b"", "tensor.malformed"),
    ],
)
def test_a_head_that_names_a_slot_and_does_not_fit_it_is_refused(head: TensorHead, inline: bytes, code: str) -> None:
    with rings(SLOT) as (_, enclave_ring), pytest.raises(ProtocolError, match=rf"^{code}: "):
        hear(tensor_frame(head, inline), ANSWERS, ring=enclave_ring)
