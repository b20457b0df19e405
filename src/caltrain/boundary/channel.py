"""One end of the door: messages and tensors over a stream socket, tensors through the ring where they fit."""

from __future__ import annotations

import socket
import struct
from typing import TypeVar

import msgspec
from msgspec.msgpack import Decoder
from torch import Tensor

from caltrain.boundary import frames, tensors
from caltrain.boundary.frames import FrameKind
from caltrain.boundary.messages import Message
from caltrain.boundary.ring import Ring
from caltrain.boundary.tensors import Role, TensorHead
from caltrain.errors import UNDECODABLE, ProtocolError

_HEAD_LENGTH = struct.Struct("<I")
_MAX_HEAD = 1024
_HEADS: Decoder[TensorHead] = Decoder(TensorHead)
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

    def send_tensor(self, tensor: Tensor, *, role: Role, run: str, epoch: int, step: int) -> None:
        """Send a dense copy of `tensor`, through the ring where it fits."""
        dense, data = tensors.flatten(tensor)
        slot = None
        if self._ring is not None and len(data) <= self._ring.slot_bytes:
            slot = self._ring.put(data)
        head = msgspec.msgpack.encode(tensors.head_of(dense, role=role, run=run, epoch=epoch, step=step, slot=slot))
        inline = [data] if slot is None else []
        frames.send_frame(self._sock, FrameKind.TENSOR, _HEAD_LENGTH.pack(len(head)), head, *inline)

    def receive(self, expected: Decoder[M]) -> M:
        """The next frame, which must be a message that `expected` decodes."""
        message = self.receive_any(expected)
        if isinstance(message, tuple):
            raise _unexpected(f"a tensor ({message[0].role}) where a message was due")
        return message

    def receive_any(self, expected: Decoder[M]) -> M | tuple[TensorHead, Tensor]:
        """The next frame: a message that `expected` decodes, or a tensor with its head."""
        kind, body = frames.receive_frame(self._sock)
        if kind is FrameKind.TENSOR:
            return self._tensor(body)
        try:
            return expected.decode(body)
        except UNDECODABLE as error:
            raise _unexpected(str(error)) from None

    def receive_tensor(self, *, role: Role, run: str, epoch: int, step: int, or_message: Decoder[M]) -> Tensor | M:
        """The tensor that is due, or a message instead. Raises ProtocolError for another."""
        got = self.receive_any(or_message)
        if not isinstance(got, tuple):
            return got
        head, tensor = got
        if (head.role, head.run, head.epoch, head.step) != (role, run, epoch, step):
            raise _unexpected(f"{head.role} of step {head.epoch}.{head.step} where {role} of {epoch}.{step} was due")
        return tensor

    def _tensor(self, body: memoryview) -> tuple[TensorHead, Tensor]:
        if len(body) < _HEAD_LENGTH.size:
            raise tensors.refuse("no head")
        (length,) = _HEAD_LENGTH.unpack(body[: _HEAD_LENGTH.size])
        start = _HEAD_LENGTH.size + length
        if length > _MAX_HEAD or start > len(body):
            raise tensors.refuse(f"a head of {length} bytes")
        try:
            head = _HEADS.decode(body[_HEAD_LENGTH.size : start])
        except UNDECODABLE as error:
            raise tensors.refuse(str(error)) from None
        if head.slot is None:
            return head, tensors.restore(head, body[start:])
        if self._ring is None or start != len(body):
            raise tensors.refuse("a ring slot without a ring, or with bytes inline")
        return head, tensors.restore(head, self._ring.view(head.slot, head.nbytes))


def _unexpected(what: str) -> ProtocolError:
    return ProtocolError(
        "door.unexpected",
        f"not what may come through the door now: {what}",
        step="receive",
        fix="The two ends run different versions, or the other one misbehaves: stop the run.",
    )
