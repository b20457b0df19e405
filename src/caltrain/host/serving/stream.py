"""The stream to a serving enclave: what is sent is answered once, in the order of sending; or all of it is lost."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import Failed, Message, Ready
from caltrain.boundary.serving import SERVING_REPLIES, Admitted, Answered, Served
from caltrain.errors import CaltrainError, ProtocolError, from_wire
from caltrain.host.serving.faults import restarted

Reply = Served | Admitted | Answered
Replied = Future[tuple[Reply, Tensors]]
"""A reply, and the IR that came with it, if any."""

_STOP_SECONDS = 10
_log = logging.getLogger(__name__)


class Process(Protocol):
    """The enclave's program, as `subprocess.Popen` shows it."""

    def kill(self) -> None:
        """End it now: its stream ends with it."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""


@dataclass(eq=False)
class Sent:
    """Something to be sent, and who waits for its answer. `batch` is the number that the answer must have."""

    send: Callable[[], None]
    due: type[Reply]
    batch: int | None = None
    reply: Replied = field(default_factory=Future)


class Stream:
    """One thread sends, one receives. Once it breaks the program is killed, and all fails with `serving.restarted`.

    Replies are resolved in the thread that receives. `on_lost` is called once, when the program has ended.
    """

    def __init__(self, process: Process, channel: Channel, *, run: str, on_lost: Callable[[], None]) -> None:
        self._process, self.channel, self.run, self._on_lost = process, channel, run, on_lost
        self._to_send: SimpleQueue[Sent | None] = SimpleQueue()  # who posts bounds what is under way
        self._due: deque[Sent] = deque()
        self._lock, self._sending, self._lost = threading.Lock(), threading.Lock(), False
        self._writer = threading.Thread(target=self._write, name="serving-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="serving-reader", daemon=True)
        self._writer.start()
        self._reader.start()

    def post(self, message: Message, due: type[Reply], *, batch: int | None = None) -> Replied:
        """Leave it to the thread that sends: it may wait, the caller does not."""
        sent = Sent(partial(self.channel.send, message), due, batch)
        with self._lock:
            if not self._lost:
                self._to_send.put(sent)
                return sent.reply
        sent.reply.set_exception(restarted())
        return sent.reply

    def send(self, sent: Sent) -> None:
        """Send it now, in the caller's thread."""
        with self._sending:  # what is due is noted in the order of sending
            if not self._noted(sent):
                sent.reply.set_exception(restarted())
                return
            try:
                sent.send()
            except Exception as error:  # noqa: BLE001  # half a frame may have gone: nothing can follow it
                self.lose(error.code if isinstance(error, CaltrainError) else type(error).__name__)

    def lose(self, why: str) -> None:
        """Give it up: whatever waits fails."""
        with self._lock:
            if self._lost:
                return
            self._lost, left = True, list(self._due)
            self._due.clear()
            while not self._to_send.empty():
                left.extend(sent for sent in (self._to_send.get(),) if sent is not None)
            self._to_send.put(None)
        _log.info("a serving enclave is gone: %s", why)
        self._process.kill()  # whichever thread has not noticed sees the stream end
        for sent in left:
            sent.reply.set_exception(restarted())
        self._process.wait(_STOP_SECONDS)
        self._on_lost()

    def close(self) -> None:
        """Wait for its end, and bring it about where it does not come."""
        self._reader.join(_STOP_SECONDS)
        self.lose("it did not stop")
        self._reader.join()

    def _noted(self, sent: Sent) -> bool:
        with self._lock:
            if not self._lost:
                self._due.append(sent)
            return not self._lost

    def _write(self) -> None:
        while (sent := self._to_send.get()) is not None:
            self.send(sent)

    def _read(self) -> None:
        why = "it ended"
        try:
            while True:
                self._receive()
        except CaltrainError as error:
            why = error.code
        finally:
            self.lose(why)
            self._writer.join()
            self.channel.close()

    def _receive(self) -> None:
        reply = self.channel.receive_any(SERVING_REPLIES)
        with self._lock:
            if not self._due or isinstance(reply, tuple | Ready):
                raise _misbehaves("an answer that is not due")
            sent = self._due.popleft()
        if isinstance(reply, Failed):
            sent.reply.set_exception(from_wire(reply.error))
            return
        try:
            if type(reply) is not sent.due or getattr(reply, "batch", None) != sent.batch:
                raise _misbehaves("another answer than is due")
            tensors = self._ir(reply.batch) if isinstance(reply, Admitted) and reply.rows else ()
        except CaltrainError:
            sent.reply.set_exception(restarted())
            raise
        sent.reply.set_result((reply, tensors))

    def _ir(self, batch: int) -> Tensors:
        got = self.channel.receive_tensors(role="ir", run=self.run, epoch=0, step=batch, or_message=SERVING_REPLIES)
        if not isinstance(got, tuple):
            raise _misbehaves("a message where an IR is due")
        return got


def _misbehaves(what: str) -> ProtocolError:
    return ProtocolError(
        "door.unexpected", f"the enclave misbehaves: {what}", step="serve", fix="Both ends must be of one version."
    )
