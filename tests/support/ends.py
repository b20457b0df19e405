"""Both ends of the door in one process, over a real socket pair and, where asked for, a real ring."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import msgspec
from msgspec.msgpack import Decoder

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.ring import Ring, Side, create_ring_memory
from caltrain.boundary.tensors import TensorHead
from support.wire import memory_socketpair

M = TypeVar("M")


@contextmanager
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of stream sockets; a test that would wait for bytes that never come fails after five seconds."""
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(5)
        other.settimeout(5)
        yield one, other


@contextmanager
def ends(*, slot_bytes: int | None = None) -> Iterator[tuple[Channel, Channel]]:
    """Channels of host and enclave."""
    with sockets() as (host, enclave):
        if slot_bytes is None:
            yield Channel(host), Channel(enclave)
        else:
            with rings(slot_bytes) as (host_ring, enclave_ring):
                yield Channel(host, host_ring), Channel(enclave, enclave_ring)


@contextmanager
def rings(slot_bytes: int) -> Iterator[tuple[Ring, Ring]]:
    """Both ends of one ring, each with a mapping of its own."""
    fd = create_ring_memory(slot_bytes)
    try:
        yield (
            Ring(fd, slot_bytes=slot_bytes, side=Side.HOST),
            Ring(fd, slot_bytes=slot_bytes, side=Side.ENCLAVE),
        )
    finally:
        os.close(fd)


def frame(body: bytes, kind: int = FrameKind.MESSAGE) -> bytes:
    """A frame as bytes, sound or not."""
    return struct.pack("<IB", len(body) + 1, kind) + body


def tensor_frame(head: TensorHead | bytes, data: bytes, *, claim: int | None = None) -> bytes:
    """A tensor frame; `claim` is what it says of the length of its head."""
    raw = head if isinstance(head, bytes) else msgspec.msgpack.encode(head)
    return frame(struct.pack("<I", len(raw) if claim is None else claim) + raw + data, FrameKind.TENSOR)


def hear(stream: bytes, expected: Decoder[M], *, ring: Ring | None = None) -> M | tuple[TensorHead, Tensors]:
    """What a channel makes of these bytes, after which the stream ends."""
    far, near = memory_socketpair()
    far.sendall(stream)
    far.close()
    return Channel(cast(socket.socket, near), ring).receive_any(expected)
