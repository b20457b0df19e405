"""The untrusted side in memory: storage as a dict, a CenterNet, a record of what crossed. Attacks replace its parts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import cast

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import (
    REPLIES_AND_CALLS,
    Answer,
    CallFailed,
    CommitCenter,
    Data,
    Progress,
    Read,
    ShowCenter,
    Write,
)
from caltrain.boundary.tensors import TensorHead
from caltrain.errors import CaltrainError, EnvironmentFault
from caltrain.host.center import Center
from caltrain.host.kept import center_object
from support.wire import Crossing, MemorySocket, memory_socketpair

OnTensor = Callable[[TensorHead, Tensors, Channel], None]


class MemoryHost:
    """Serves an enclave's calls. A hostile host replaces `on_read`, `on_write`, `on_commit`, `on_show`, `on_tensor`."""

    def __init__(self) -> None:
        self.storage: dict[str, bytearray] = {}
        self.center: Center | None = None
        self.log: list[Crossing] = []
        self.reconnect()
        self.on_read: Callable[[Read], Answer] = self.read
        self.on_write: Callable[[Write], Answer] = self.write
        self.on_commit: Callable[[CommitCenter], Answer] = self.commit
        self.on_show: Callable[[ShowCenter], Answer] = self.show
        self.on_tensor: OnTensor = self.take

    def reconnect(self) -> None:
        """A stream to a new enclave: what was on its way in the old one is lost. `sent` begins anew."""
        self.end, enclave_end = memory_socketpair()
        self.enclave_end: MemorySocket = enclave_end
        self.channel = Channel(cast(socket.socket, self.end))
        self.enclave_channel = Channel(cast(socket.socket, enclave_end))
        enclave_end.turn = self.serve
        self.end.acted = lambda: self.log.append(Crossing("in"))

    def be_honest(self) -> None:
        """From now on answer as an honest host does."""
        self.on_read, self.on_write = self.read, self.write
        self.on_commit, self.on_show, self.on_tensor = self.commit, self.show, self.take

    def serve(self) -> None:
        """Answer what the enclave has sent."""
        while self.end.inbox:
            got = self.channel.receive_any(REPLIES_AND_CALLS)
            if isinstance(got, tuple):
                self.log.append(Crossing("out", head=got[0], tensors=tuple(x.clone() for x in got[1])))
                self.on_tensor(*got, self.channel)
            else:
                self.log.append(Crossing("out", message=got))
                answer = self._answer(got)
                if answer is not None:
                    self.channel.send(answer)

    def unread(self) -> list[object]:
        """What the enclave sent and nobody has answered."""
        found: list[object] = []
        while self.end.inbox:
            got = self.channel.receive_any(REPLIES_AND_CALLS)
            found.append(got)
        return found

    def read(self, call: Read) -> Answer:
        """The honest answer to a read."""
        stored = self.storage.get(call.name)
        if stored is None:
            error = EnvironmentFault("storage.missing", f"no object {call.name}", step="read object", fix="Send it.")
            return CallFailed(error.diagnostics())
        return Data(bytes(stored[call.offset : call.offset + call.length]))

    def write(self, call: Write) -> Answer:
        """The honest answer to a write."""
        stored = self.storage.setdefault(call.name, bytearray())
        stored.extend(bytes(max(0, call.offset - len(stored))))
        stored[call.offset : call.offset + len(call.data)] = call.data
        return Data()

    def commit(self, call: CommitCenter) -> Answer:
        """The honest answer to a demand for a commitment."""
        commitment = self.the_center.commit(call.epoch, call.step)
        if call.durable:
            state = self.the_center.committed(call.epoch, call.step)
            self.storage[center_object(call.epoch, call.step)] = bytearray(state)
        return Data(commitment)

    def show(self, call: ShowCenter) -> Answer:
        """The honest answer to a demand for a committed state."""
        try:
            state = self.the_center.committed(call.epoch, call.step)
        except CaltrainError as error:
            return CallFailed(error.diagnostics())
        self.storage["center-state"] = bytearray(state)
        return Data(len(state).to_bytes(8, "big"))

    def take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        """The honest handling of tensors."""
        try:
            self.the_center.take(head, tensors, channel)
        except CaltrainError as error:
            if self.end.peer is not None:
                self.channel.send(CallFailed(error.diagnostics()))

    @property
    def the_center(self) -> Center:
        """The CenterNet, once there is one."""
        if self.center is None:
            raise EnvironmentFault("center.none", "there is no CenterNet yet", step="serve", fix="Ingest first.")
        return self.center

    def out(self) -> list[TensorHead]:
        """Heads of all tensors that left the enclave."""
        return [c.head for c in self.log if c.way == "out" and c.head is not None]

    def _answer(self, call: object) -> Answer | None:
        match call:
            case Read():
                return self.on_read(call)
            case Write():
                return self.on_write(call)
            case CommitCenter():
                return self.on_commit(call)
            case ShowCenter():
                return self.on_show(call)
            case Progress():
                return None
            case _:
                raise AssertionError(f"the enclave sent {call!r} in the middle of a request")
