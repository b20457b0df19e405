"""Framing: what comes out is what went in, and nothing else gets past the head of a frame."""

from __future__ import annotations

import socket
import struct
import threading
import tracemalloc

import pytest

from caltrain.boundary.frames import MAX_FRAME, FrameKind, receive_frame, send_frame
from caltrain.errors import EnvironmentFault, ProtocolError
from support.ends import sockets


def head(length: int, kind: int) -> bytes:
    return struct.pack("<IB", length, kind)


@pytest.mark.parametrize("kind", list(FrameKind))
@pytest.mark.parametrize("parts", [[], [b""], [b"abc"], [b"ab", memoryview(b"c"), b"", b"d" * 1000]])
def test_a_frame_arrives_as_the_parts_that_were_sent(kind: FrameKind, parts: list[bytes]) -> None:
    with sockets() as (near, far):
        send_frame(near, kind, *parts)
        send_frame(near, FrameKind.MESSAGE, b"next")
        got, body = receive_frame(far)
        assert (got, bytes(body)) == (kind, b"".join(parts))
        assert bytes(receive_frame(far)[1]) == b"next"
        assert bytes(body) == b"".join(parts), "a later frame changed an earlier one"


def test_the_form_on_the_wire_is_length_kind_body() -> None:
    with sockets() as (near, far):
        send_frame(near, FrameKind.TENSOR, b"xyz")
        assert far.recv(100) == b"\x04\0\0\0\x02xyz"


@pytest.mark.parametrize(
    ("length", "kind"),
    [(0, 1), (MAX_FRAME + 1, 1), (MAX_FRAME + 1, 2), (0xFFFFFFFF, 1), (4, 0), (4, 3), (4, 255)],
)
def test_a_malformed_head_is_refused_before_its_body_is_read(length: int, kind: int) -> None:
    with sockets() as (near, far):
        near.sendall(head(length, kind) + b"body")
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError, match=r"^frame\.malformed: "):
                receive_frame(far)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20, "memory was taken on the word of the other end"
        finally:
            tracemalloc.stop()
        assert far.recv(100) == b"body"


@pytest.mark.parametrize("length", [1, MAX_FRAME])
def test_the_shortest_and_the_longest_frame_are_let_in(length: int) -> None:
    body = bytes(length - 1)
    with sockets() as (near, far):
        sender = threading.Thread(target=send_frame, args=(near, FrameKind.MESSAGE, body))
        sender.start()
        _, got = receive_frame(far)
        sender.join()
    assert len(got) == length - 1


@pytest.mark.parametrize("cut", range(len(head(9, 1)) + 8))
def test_a_stream_that_ends_inside_a_frame_is_a_closed_door(cut: int) -> None:
    with sockets() as (near, far):
        near.sendall((head(9, 1) + b"12345678")[:cut])
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(EnvironmentFault, match=r"^door\.closed: .*end of stream"):
            receive_frame(far)


def test_a_reset_or_a_silence_of_the_other_end_is_a_closed_door() -> None:
    with sockets() as (near, far):
        far.settimeout(0.05)
        with pytest.raises(EnvironmentFault, match=r"^door\.closed: .*timed out"):
            receive_frame(far)
        with pytest.raises(EnvironmentFault, match=r"^door\.closed: .*timed out"):
            send_frame(far, FrameKind.MESSAGE, bytes(1 << 24))
        near.close()
        with pytest.raises(EnvironmentFault, match=r"^door\.closed: .*Broken pipe"):
            send_frame(far, FrameKind.MESSAGE, b"x")


def test_bytes_that_trickle_in_make_a_whole_frame() -> None:
    stream = head(1 + 50, 2) + bytes(range(50))
    with sockets() as (near, far):

        def trickle() -> None:
            for byte in stream:
                near.sendall(bytes([byte]))

        sender = threading.Thread(target=trickle)
        sender.start()
        kind, body = receive_frame(far)
        sender.join()
    assert (kind, bytes(body)) == (FrameKind.TENSOR, bytes(range(50)))


def test_a_frame_larger_than_the_socket_takes_at_once_arrives_whole() -> None:
    body = bytes(range(256)) * 8192  # 2 MiB through a buffer of a few KiB: many partial sends
    with sockets() as (near, far):
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sender = threading.Thread(target=send_frame, args=(near, FrameKind.MESSAGE, body[:5], memoryview(body)[5:]))
        sender.start()
        _, got = receive_frame(far)
        sender.join()
    assert got == body


def test_a_frame_that_is_too_large_is_not_begun() -> None:
    with sockets() as (near, far):
        with pytest.raises(ProtocolError, match=r"^frame\.too-large: "):
            send_frame(near, FrameKind.MESSAGE, bytes(MAX_FRAME))
        far.settimeout(0)
        with pytest.raises(BlockingIOError):
            far.recv(1)
