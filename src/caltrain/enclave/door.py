"""The enclave's end of the door while it works on a request: calls to the host, and tensors to its center."""

from __future__ import annotations

from torch import Tensor

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import ANSWERS, MAX_CHUNK, Answer, Call, CallFailed, CommitCenter, Progress, Read, Write
from caltrain.boundary.tensors import Role, refuse
from caltrain.errors import ProtocolError, from_wire


class Door:
    """Calls that are bounded, and whose answers are checked for form; their content is for the caller to verify."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

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

    def write(self, name: str, data: bytes, *, offset: int) -> None:
        """Have the host store `data` at `offset`."""
        view = memoryview(data)
        for start in range(0, len(view), MAX_CHUNK):
            self._call(Write(name, offset + start, bytes(view[start : start + MAX_CHUNK])))

    def commit_center(self, epoch: int) -> bytes:
        """The host's commitment (32 bytes) to the CenterNet's state after `epoch`."""
        raw = self._call(CommitCenter(epoch))
        if len(raw) != 32:
            raise ProtocolError(
                "center.no-commitment",
                f"the host committed to its center with {len(raw)} bytes, not 32",
                step="commit center",
                fix="Stop the run: the host does not follow the protocol.",
            )
        return raw

    def progress(self, phase: str, done: int, total: int, *, loss: float | None = None) -> None:
        """Tell the host how far we are; it does not answer."""
        self._channel.send(Progress(phase, done, total, loss))

    def exchange(
        self, outgoing: dict[Role, Tensor], *, due: Role, shape: tuple[int, ...], run: str, epoch: int, step: int
    ) -> Tensor:
        """Send tensors of a step and receive the one that is due: float32, of `shape`, finite."""
        for role, tensor in outgoing.items():
            self._channel.send_tensor(tensor, role=role, run=run, epoch=epoch, step=step)
        got = self._channel.receive_tensor(role=due, run=run, epoch=epoch, step=step, or_message=ANSWERS)
        if not isinstance(got, Tensor):
            raise _failure(got)
        if tuple(got.shape) != shape or not got.is_floating_point() or not bool(got.isfinite().all()):
            raise refuse(f"{due} of {tuple(got.shape)} {got.dtype}, expected finite float32 of {shape}")
        return got

    def _call(self, call: Call) -> bytes:
        self._channel.send(call)
        answer = self._channel.receive(ANSWERS)
        if isinstance(answer, CallFailed):
            raise _failure(answer)
        return answer.data


def _failure(answer: Answer) -> Exception:
    if isinstance(answer, CallFailed):
        return from_wire(answer.error)
    return refuse("data where a tensor was due")
