"""A byte stream in memory, so that both ends of the door run in one thread and every frame is on record.

When the enclave waits for bytes and there are none, the host is given its turn. Everything above the stream is the
real thing: framing, decoding and the checks of `Channel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from caltrain.boundary.channel import Tensors
from caltrain.boundary.messages import Message
from caltrain.boundary.tensors import TensorHead


class MemorySocket:
    """What `frames` uses of a socket. `turn` is called when a read finds nothing, `acted` whenever this end acts."""

    def __init__(self) -> None:
        self.inbox = bytearray()
        self.sent = bytearray()
        self.peer: MemorySocket | None = None
        self.turn: Callable[[], None] = lambda: None
        self.acted: Callable[[], None] = lambda: None

    def sendall(self, data: bytes | memoryview) -> None:
        """Hand `data` to the other end; fails like a socket once that end is closed."""
        if self.peer is None:
            raise BrokenPipeError("closed")
        self.acted()
        self.sent += data
        self.peer.inbox += data

    def recv_into(self, view: memoryview) -> int:
        """Some bytes, or 0 at the end of the stream: there is nobody who could send more."""
        if not self.inbox:
            self.turn()
        count = min(len(view), len(self.inbox))
        view[:count] = self.inbox[:count]
        del self.inbox[:count]
        return count

    def close(self) -> None:
        """Close this end: the other one reads what is on its way, then the end."""
        self.acted()
        if self.peer is not None:
            self.peer.peer = None
        self.peer = None


def memory_socketpair() -> tuple[MemorySocket, MemorySocket]:
    """Two ends of one stream."""
    one, other = MemorySocket(), MemorySocket()
    one.peer, other.peer = other, one
    return one, other


@dataclass(frozen=True)
class Crossing:
    """What came out of the enclave (a message, or tensors with their head), or that the host acted."""

    way: Literal["in", "out"]
    message: Message | None = None
    head: TensorHead | None = None
    tensors: Tensors = ()
