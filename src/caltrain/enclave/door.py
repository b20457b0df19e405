"""The enclave's end of the door while it works on a request: calls to the host, and tensors to its center."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import (
    ANSWERS,
    MAX_CHUNK,
    Answer,
    Call,
    CallFailed,
    CommitCenter,
    Progress,
    Read,
    ShowCenter,
    Write,
)
from caltrain.boundary.tensors import Role, refuse
from caltrain.errors import CaltrainError, ProtocolError, from_wire
from caltrain.models.layers import Shape
from caltrain.training.zone import At


class Door:
    """Calls that are bounded, and whose answers are checked for form; their content is for the caller to verify.

    What the host stores is read and written over a stream of its own where there is one: the next batches can then be
    read while the host computes.
    """

    def __init__(self, channel: Channel, storage: Channel | None = None, *, max_rms: float = 1e4) -> None:
        self._channel = channel
        self._storage = storage or channel
        self._turn = threading.Lock()
        self.max_rms = max_rms

    @property
    def reads_ahead(self) -> bool:
        """Whether another thread may read while this one waits for the center."""
        return self._storage is not self._channel

    def read(self, name: str, *, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a stored object, in as many reads as it takes."""
        parts: list[bytes] = []
        while length > 0:
            part = self._call(Read(name, offset, min(length, MAX_CHUNK)))
            if not part or len(part) > length:
                raise ProtocolError(
                    "storage.short",
                    f"the host's copy of {name} ends at byte {offset}",
                    step="read from host",
                    fix="The object was cut short: send it again.",
                )
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def read_up_to(self, name: str, *, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer at the object's end."""
        part = self._call(Read(name, offset, min(length, MAX_CHUNK)))
        return part[:length]

    def read_all(self, name: str, *, limit: int) -> bytes:
        """A whole object. Raises ProtocolError `storage.too-long` beyond `limit` bytes."""
        raw = bytearray()
        while part := self.read_up_to(name, offset=len(raw), length=MAX_CHUNK):
            raw += part
            if len(raw) > limit:
                raise ProtocolError(
                    "storage.too-long",
                    f"the host's object {name} has more than {limit} bytes",
                    step="read from host",
                    fix="Give the host the object that the plan names.",
                )
        return bytes(raw)

    def write(self, name: str, data: bytes, *, offset: int, durable: bool = False) -> None:
        """Have the host store `data` at `offset`; if `durable`, it says when the whole object is on its disk."""
        view = memoryview(data)
        for start in range(0, len(view), MAX_CHUNK):
            last = start + MAX_CHUNK >= len(view)
            self._call(Write(name, offset + start, bytes(view[start : start + MAX_CHUNK]), durable and last))

    def commit_center(self, epoch: int, step: int, *, durable: bool = False) -> bytes:
        """The host's commitment (32 bytes) to the CenterNet's state before that step."""
        return self._fixed(CommitCenter(epoch, step, durable), 32)

    def show_center(self, epoch: int, step: int, *, limit: int) -> bytes:
        """The state (safetensors) to which the host committed before that step, at most `limit` bytes."""
        length = int.from_bytes(self._fixed(ShowCenter(epoch, step), 8), "big")
        if length > limit:
            raise ProtocolError(
                "center.too-large",
                f"a CenterNet of {length} bytes, the plan's has at most {limit}",
                step="read center",
                fix="Stop the run: the host does not hold the model of the plan.",
            )
        return self.read("center-state", offset=0, length=length)

    def progress(self, phase: str, done: int, total: int, *, loss: float | None = None) -> None:
        """Tell the host how far we are; it does not answer."""
        self._channel.send(Progress(phase, done, total, loss))

    def exchange(
        self, outgoing: Mapping[Role, Sequence[Tensor]], *, due: Role, shapes: Sequence[Shape], run: str, at: At
    ) -> Tensors:
        """Send tensors of a step and receive those that are due: float32, of `shapes`, none NaN, infinite or huge."""
        for role, tensors in outgoing.items():
            self._channel.send_tensors(tensors, role=role, run=run, epoch=at.epoch, step=at.step)
        got = self._channel.receive_tensors(role=due, run=run, epoch=at.epoch, step=at.step, or_message=ANSWERS)
        if not isinstance(got, tuple):
            raise _failure(got)
        if [tuple(x.shape) for x in got] != list(shapes) or any(x.dtype != torch.float32 for x in got):
            raise refuse(f"{due} of {[(tuple(x.shape), x.dtype) for x in got]}, expected float32 of {list(shapes)}")
        for x in got:
            self._check_size(due, x)
        return got

    def _check_size(self, due: Role, x: Tensor) -> None:
        # One pass finds NaN and infinity too: neither is below the bound.
        norm = float(torch.linalg.vector_norm(x))
        if not norm <= self.max_rms * x.numel() ** 0.5:
            raise refuse(f"{due} is not finite, or its root mean square is above {self.max_rms:g}")

    def _fixed(self, call: Call, size: int) -> bytes:
        raw = _ask(self._channel, call)
        if len(raw) != size:
            raise ProtocolError(
                "center.no-commitment",
                f"the host answered for its center with {len(raw)} bytes, not {size}",
                step="commit center",
                fix="Stop the run: the host does not follow the protocol.",
            )
        return raw

    def _call(self, call: Call) -> bytes:
        with self._turn:
            return _ask(self._storage, call)


def _ask(channel: Channel, call: Call) -> bytes:
    channel.send(call)
    answer = channel.receive(ANSWERS)
    if isinstance(answer, CallFailed):
        raise _failure(answer)
    return answer.data


def _failure(answer: Answer) -> CaltrainError:
    return from_wire(answer.error) if isinstance(answer, CallFailed) else refuse("data where a tensor was due")
