"""Framing of the byte stream: `length (4) | kind (1) | body`, length over kind and body, little endian.

A frame is read whole into memory of its own before anything in it is looked at.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

from caltrain.errors import EnvironmentFault, ProtocolError

MAX_FRAME = 64 << 20
_HEAD = struct.Struct("<IB")


class FrameKind(IntEnum):
    """What a frame's body is."""

    MESSAGE = 1
    TENSOR = 2


def _closed(what: str) -> EnvironmentFault:
    return EnvironmentFault(
        "door.closed",
        f"the other end of the door is gone: {what}",
        step="exchange frames",
        fix="Look at the log of host and enclave for why it ended, and start the run again.",
    )


def send_frame(sock: socket.socket, kind: FrameKind, *parts: bytes | memoryview) -> None:
    """Send one frame whose body is the concatenation of `parts`. Raises ProtocolError, EnvironmentFault."""
    length = 1 + sum(len(part) for part in parts)
    if length > MAX_FRAME:
        raise ProtocolError(
            "frame.too-large",
            f"a frame of {length} bytes, at most {MAX_FRAME}",
            step="send frame",
            fix="Use a smaller batch, or a cut with a smaller IR.",
        )
    try:
        sock.sendall(_HEAD.pack(length, kind))
        for part in parts:
            sock.sendall(part)
    except OSError as error:
        raise _closed(str(error)) from error


def receive_frame(sock: socket.socket) -> tuple[FrameKind, memoryview]:
    """The next frame. Raises ProtocolError for a malformed one, EnvironmentFault when the stream ends."""
    length, kind = _HEAD.unpack(_exactly(sock, _HEAD.size))
    if not 1 <= length <= MAX_FRAME or kind not in {FrameKind.MESSAGE, FrameKind.TENSOR}:
        raise ProtocolError(
            "frame.malformed",
            f"a frame of kind {kind} claims {length} bytes",
            step="receive frame",
            fix="The two ends run different versions, or the other one misbehaves: start the run again.",
        )
    return FrameKind(kind), memoryview(_exactly(sock, length - 1))


def _exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, filled = memoryview(buffer), 0
    while filled < size:
        try:
            count = sock.recv_into(view[filled:])
        except OSError as error:
            raise _closed(str(error)) from error
        if count == 0:
            raise _closed("end of stream")
        filled += count
    return buffer
