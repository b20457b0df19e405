"""Start the enclave program, and speak with it: one request at a time, serving its calls while it works."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import (
    REPLIES_AND_CALLS,
    STORAGE_CALLS,
    Boot,
    CallFailed,
    CommitCenter,
    Data,
    Done,
    Failed,
    Progress,
    Read,
    Ready,
    Request,
    ShowCenter,
    Stop,
    Write,
)
from caltrain.boundary.ring import Ring, Side, create_ring_memory
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, EnvironmentFault, ProtocolError, from_wire
from caltrain.host.confine import confined_command, enclave_environment, find_bubblewrap
from caltrain.host.kept import keep_center
from caltrain.host.store import Store

OnProgress = Callable[[Progress], None]
OnEvents = Callable[[tuple[Envelope, ...]], None]
_STOP_SECONDS = 10
_BUSY_SECONDS = 5.0


class CenterWorker(Protocol):
    """Runs the CenterNet: takes tensors of a step, sends back what is due."""

    def take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        """Handle tensors of the enclave's that crossed together."""

    def commit(self, epoch: int, step: int) -> bytes:
        """Digest (32 bytes) of the CenterNet's state before that step."""

    def committed(self, epoch: int, step: int) -> bytes:
        """That state, as safetensors."""


@dataclass
class Enclave:
    """A running enclave program. `request` may be called from any thread."""

    process: subprocess.Popen[bytes]
    channel: Channel
    store: Store
    ready: Ready
    on_progress: OnProgress
    on_events: OnEvents
    center: CenterWorker | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def request(self, message: Request, *, wait: float = _BUSY_SECONDS) -> Done:
        """Send a request, serve its calls, return its reply. Raises the enclave's error, or `enclave.busy`."""
        if not self._lock.acquire(timeout=wait):
            raise EnvironmentFault(
                "enclave.busy",
                "the enclave is at work on the run",
                step=f"request {type(message).__name__}",
                fix="Try again in a few seconds.",
            )
        try:
            return self._converse(message)
        except EnvironmentFault as error:
            if error.code == "door.closed":
                raise self._died() from error
            raise
        finally:
            self._lock.release()

    def check_alive(self) -> None:
        """Raise EnvironmentFault `enclave.died` if the program has ended."""
        if self.process.poll() is not None:
            raise self._died()

    def stop(self) -> None:
        """End the program: politely where it listens, by signal where it is at work. What it holds is gone."""
        if self._lock.acquire(timeout=0.2):
            try:
                self.channel.send(Stop())
            except EnvironmentFault:
                pass  # it is gone already, or about to be
            finally:
                self.channel.close()
                self._lock.release()
        else:
            self.process.kill()  # the thread that converses sees the stream end
        end_program(self.process)

    def _died(self) -> EnvironmentFault:
        return EnvironmentFault(
            "enclave.died",
            f"the enclave program has ended (exit status {end_program(self.process)})",
            step="converse with the enclave",
            fix="Read enclave.log in the host's folder, stop the host and serve the folder again with --resume: "
            "what was not checkpointed is trained again.",
        )

    def _converse(self, message: Request) -> Done:
        self.channel.send(message)
        while True:
            got = self.channel.receive_any(REPLIES_AND_CALLS)
            match got:
                case Done():
                    self.on_events(got.events)  # before the next request, so that they are kept in order
                    return got
                case Failed():
                    self.on_events(got.events)
                    raise from_wire(got.error)
                case Progress():
                    self.on_progress(got)
                case Read() | Write():
                    self.channel.send(serve_storage(self.store, got))
                case CommitCenter() | ShowCenter():
                    self.channel.send(self._of_center(got))
                case (head, tensors):
                    self._to_center(head, tensors)
                case _:
                    raise _misbehaves("an answer that is not due")

    def _of_center(self, call: CommitCenter | ShowCenter) -> Data | CallFailed:
        try:
            center = self._center()
            if isinstance(call, ShowCenter):
                raw = center.committed(call.epoch, call.step)
                self.store.put("center-state", raw)
                return Data(len(raw).to_bytes(8, "big"))
            commitment = center.commit(call.epoch, call.step)
            if call.durable:
                keep_center(self.store, call.epoch, call.step, center.committed(call.epoch, call.step))
            return Data(commitment)
        except CaltrainError as error:
            return CallFailed(error.diagnostics())

    def _to_center(self, head: TensorHead, tensors: Tensors) -> None:
        try:
            self._center().take(head, tensors, self.channel)
        except CaltrainError as error:
            self.channel.send(CallFailed(error.diagnostics()))

    def _center(self) -> CenterWorker:
        if self.center is None:
            raise _misbehaves("a tensor before there is a CenterNet")
        return self.center


def serve_storage(store: Store, call: Read | Write) -> Data | CallFailed:
    """Answer the enclave's call for bytes that the host keeps."""
    try:
        if isinstance(call, Read):
            return Data(store.read(call.name, offset=call.offset, length=call.length))
        store.write(call.name, call.data, offset=call.offset, durable=call.durable)
        return Data()
    except CaltrainError as error:
        return CallFailed(error.diagnostics())


def _serve_until_closed(store: Store, channel: Channel) -> None:
    """The storage stream, in a thread of its own: the enclave reads its next batches while the center computes."""
    try:
        while True:
            channel.send(serve_storage(store, channel.receive(STORAGE_CALLS)))
    except CaltrainError:  # the enclave is gone, or sends what it may not: the other stream tells
        channel.close()


def launch(
    store: Store,
    *,
    slot_bytes: int,
    threads: int,
    root_secret: bytes,
    wheel: bytes = b"",
    on_progress: OnProgress,
    on_events: OnEvents,
    log: int,
) -> Enclave:
    """Start the enclave as a program of its own and wait until it has locked itself down.

    `log` is a descriptor for its standard error. Raises EnvironmentFault `enclave.did-not-start`.
    """
    process, channel, ready = start_program(
        Boot("simulated", root_secret, wheel),
        slot_bytes=slot_bytes,
        threads=threads,
        log=log,
        serve=lambda stream: _serve_until_closed(store, stream),
    )
    return Enclave(process, channel, store, ready, on_progress, on_events)


def start_program(
    boot: Boot, *, slot_bytes: int, threads: int, log: int, serve: Callable[[Channel], None]
) -> tuple[subprocess.Popen[bytes], Channel, Ready]:
    """Start the program and wait for its first words. `serve` answers its storage stream, in a thread of its own.

    Raises EnvironmentFault `enclave.did-not-start`.
    """
    (ours, theirs), (our_storage, their_storage) = socket.socketpair(), socket.socketpair()
    ring_fd = create_ring_memory(slot_bytes)
    environment = enclave_environment(threads)
    arguments = [str(n) for n in (theirs.fileno(), their_storage.fileno(), ring_fd, slot_bytes, threads)]
    argv = [sys.executable, "-I", "-m", "caltrain.enclave", *arguments]
    command = confined_command(argv, bwrap=find_bubblewrap().bwrap, read_only=(), environment=environment)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(theirs.fileno(), their_storage.fileno(), ring_fd),
        )
        ring = Ring(ring_fd, slot_bytes=slot_bytes, side=Side.HOST)
    finally:
        theirs.close()
        their_storage.close()
        os.close(ring_fd)
    channel = Channel(ours, ring)
    threading.Thread(target=serve, args=(Channel(our_storage),), name="storage", daemon=True).start()
    try:
        channel.send(boot)
        ready = channel.receive(REPLIES_AND_CALLS)
        if not isinstance(ready, Ready):
            raise _misbehaves("its first words are not Ready")
    except CaltrainError as error:
        channel.close()
        raise EnvironmentFault(
            "enclave.did-not-start",
            f"the enclave program ended at once (exit status {end_program(process)}): {error.what}",
            step="launch enclave",
            fix="Read enclave.log in the host's folder; `caltrain doctor` says what the sandbox needs.",
        ) from error
    return process, channel, ready


def end_program(process: subprocess.Popen[bytes]) -> int:
    """Exit status of a program whose stream has ended; one that goes on all the same is killed."""
    try:
        return process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _misbehaves(what: str) -> ProtocolError:
    return ProtocolError(
        "door.unexpected", f"the enclave misbehaves: {what}", step="serve enclave", fix="Stop it; both ends must match."
    )
