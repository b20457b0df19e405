"""One end of the door: messages and tensors over a stream socket, tensors through the ring where they fit."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from msgspec.msgpack import Decoder
from torch import Tensor

from caltrain.boundary import frames
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.messages import Message
from caltrain.boundary.ring import Ring
from caltrain.boundary.tensors import Role, TensorHead, flatten, layout_of, refuse, restore
from caltrain.errors import UNDECODABLE, ProtocolError

_HEAD_LENGTH = struct.Struct("<I")
_MAX_HEAD = 16 << 10
_HEADS: Decoder[TensorHead] = Decoder(TensorHead)
Tensors = tuple[Tensor, ...]
M = TypeVar("M")


class Channel:
    """Typed messages and tensors. A received tensor is a private copy whose form has been checked."""

    def __init__(self, sock: socket.socket, ring: Ring | None = None) -> None:
        self._sock = sock
        self._ring = ring

    def close(self) -> None:
        """Close our end; the other one then sees the end of the stream."""
        self._sock.close()

    def send(self, message: Message) -> None:
        """Send one message."""
        frames.send_frame(self._sock, FrameKind.MESSAGE, msgspec.msgpack.encode(message))

    def send_tensors(self, tensors: Sequence[Tensor], *, role: Role, run: str, epoch: int, step: int) -> None:
        """Send dense copies of `tensors` together, through the ring where they fit."""
        dense, data = zip(*(flatten(tensor) for tensor in tensors), strict=True)
        slot = None
        if self._ring is not None and sum(map(len, data)) <= self._ring.slot_bytes:
            slot = self._ring.put(data)
        head = TensorHead(role, run, epoch, step, tuple(map(layout_of, dense)), slot)
        raw = msgspec.msgpack.encode(head)
        inline = data if slot is None else ()
        frames.send_frame(self._sock, FrameKind.TENSOR, _HEAD_LENGTH.pack(len(raw)), raw, *inline)

    def receive(self, expected: Decoder[M]) -> M:
        """The next frame, which must be a message that `expected` decodes."""
        message = self.receive_any(expected)
        if isinstance(message, tuple):
            raise _unexpected(f"tensors ({message[0].role}) where a message was due")
        return message

    def receive_any(self, expected: Decoder[M]) -> M | tuple[TensorHead, Tensors]:
        """The next frame: a message that `expected` decodes, or tensors with their head."""
        kind, body = frames.receive_frame(self._sock)
        if kind is FrameKind.TENSOR:
            return self._tensors(body)
        try:
            return expected.decode(body)
        except UNDECODABLE as error:
            raise _unexpected(str(error)) from None

    def receive_tensors(self, *, role: Role, run: str, epoch: int, step: int, or_message: Decoder[M]) -> Tensors | M:
        """The tensors that are due, or a message instead. Raises ProtocolError for others."""
        got = self.receive_any(or_message)
        if not isinstance(got, tuple):
            return got
        head, tensors = got
        if (head.role, head.run, head.epoch, head.step) != (role, run, epoch, step):
            raise _unexpected(f"{head.role} of step {head.epoch}.{head.step} where {role} of {epoch}.{step} was due")
        return tensors

    def _tensors(self, body: memoryview) -> tuple[TensorHead, Tensors]:
        if len(body) < _HEAD_LENGTH.size:
            raise refuse("no head")
        (length,) = _HEAD_LENGTH.unpack(body[: _HEAD_LENGTH.size])
        start = _HEAD_LENGTH.size + length
        if length > _MAX_HEAD or start > len(body):
            raise refuse(f"a head of {length} bytes")
        try:
            head = _HEADS.decode(body[_HEAD_LENGTH.size : start])
        except UNDECODABLE as error:
            raise refuse(str(error)) from None
        if head.slot is None:
            return head, restore(head, body[start:])
        if self._ring is None or start != len(body):
            raise refuse("a ring slot without a ring, or with bytes inline")
        return head, restore(head, self._ring.view(head.slot, head.nbytes))


def _unexpected(what: str) -> ProtocolError:
    return ProtocolError(
        "door.unexpected",
        f"not what may come through the door now: {what}",
        step="receive",
        fix="The two ends run different versions, or the other one misbehaves: stop the run.",
    )
