"""A running serving enclave and the way of a batch: into it, through the center, into it again, back to its callers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeVar, cast

from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import Attest, Stop
from caltrain.boundary.serving import (
    MAX_BATCHES,
    Abandon,
    Admitted,
    Answered,
    CloseSession,
    Grant,
    Infer,
    LoadPackage,
    OpenSession,
    Served,
)
from caltrain.errors import from_wire
from caltrain.host.serving.faults import Outcome, busy, center_failed, restarted
from caltrain.host.serving.stream import Process, Replied, Sent, Stream

Question = LoadPackage | Attest | Grant | OpenSession | CloseSession
OnComputed = Callable[["Tensors | None"], None]
MAX_ASKED = 16
T = TypeVar("T")


class Center(Protocol):
    """Runs the CenterNet in a thread of its own."""

    def submit(self, tensors: Tensors, then: OnComputed) -> None:
        """Compute, then call `then` with what is due, or with None where that failed. Does not wait."""


class _Batch:
    """Requests that are computed together, and what is known of each so far. It ends once, in any thread."""

    def __init__(self, number: int, requests: int) -> None:
        self.number, self.outcomes = number, cast("list[Outcome | None]", [None] * requests)
        self.done = _begun(Future[list[Outcome]]())
        self.failed = False
        """Whether the center could not compute it."""
        self._ends = threading.Lock()

    def settle(self, found: Mapping[int, Outcome]) -> None:
        """What became of requests, by their place. Each has one outcome: the first."""
        for place, outcome in found.items():
            if 0 <= place < len(self.outcomes) and self.outcomes[place] is None:
                self.outcomes[place] = outcome

    def end(self, error: BaseException | None = None) -> None:
        """Tell the caller: the error of all of them, or what each came to. Later ends change nothing."""
        if not self._ends.acquire(blocking=False):
            return
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result([outcome for outcome in self.outcomes if outcome is not None])


class ServingEnclave:
    """May be used from any thread, and never waits but to stop. A reply comes, or `serving.restarted`.

    `run` is the package's id, which all its tensors carry.
    """

    def __init__(
        self, process: Process, channel: Channel, *, run: str, center: Center, on_lost: Callable[[], None]
    ) -> None:
        self._center, self._on_lost = center, on_lost
        self._batches: set[_Batch] = set()
        self._may_ask, self._may_infer = threading.Semaphore(MAX_ASKED), threading.Semaphore(MAX_BATCHES)
        self._numbers = itertools.count()
        self._stream = Stream(process, channel, run=run, on_lost=self._lost)

    def ask(self, message: Question) -> Future[Served]:
        """Its answer to anything but a batch, or its error. At most 16 at a time, else `serving.busy`."""
        answer = _begun(Future[Served]())
        if not self._may_ask.acquire(blocking=False):
            answer.set_exception(busy("too many questions to the enclave are waiting"))
            return answer

        def answered(future: Replied) -> None:
            self._may_ask.release()
            error = future.exception()
            if error is not None:
                answer.set_exception(error)
            elif isinstance(served := future.result()[0], Served):
                answer.set_result(served)

        self._stream.post(message, Served).add_done_callback(answered)
        return answer

    def infer(self, requests: Sequence[bytes]) -> Future[list[Outcome]]:
        """Have requests computed together: an answer or an error for each, in their order."""
        batch = _Batch(next(self._numbers), len(requests))
        if not self._may_infer.acquire(blocking=False):
            batch.end(busy("too many batches are under way"))
            return batch.done
        self._batches.add(batch)
        batch.done.add_done_callback(lambda _: self._ended(batch))
        infer = Infer(batch.number, tuple(requests))
        self._stream.post(infer, Admitted, batch=batch.number).add_done_callback(partial(self._admitted, batch))
        return batch.done

    def stop(self) -> None:
        """End the program: politely, then by signal. What it holds is gone. Waits for its end."""
        self._stream.post(Stop(), Served)
        self._stream.close()

    # -- the way of a batch: each is called once, in the thread that has the news ----------------------------------

    def _admitted(self, batch: _Batch, future: Replied) -> None:
        if (error := future.exception()) is not None:
            batch.end(error)
            return
        reply, tensors = future.result()
        if isinstance(reply, Admitted):
            batch.settle({place: from_wire(fields) for place, fields in reply.refused.items()})
            if reply.rows:
                self._center.submit(tensors, partial(self._computed, batch))
            else:
                self._finish(batch)

    def _computed(self, batch: _Batch, tensors: Tensors | None) -> None:
        """Sends from here: the center's thread may wait, and another one would only cost time."""
        channel, run, batch.failed = self._stream.channel, self._stream.run, tensors is None
        send = partial(channel.send, Abandon(batch.number))
        if tensors is not None:
            send = partial(channel.send_tensors, tensors, role="center-out", run=run, epoch=0, step=batch.number)
        sent = Sent(send, Answered, batch.number)
        sent.reply.add_done_callback(partial(self._answered, batch))
        self._stream.send(sent)

    def _answered(self, batch: _Batch, future: Replied) -> None:
        if (error := future.exception()) is not None:
            batch.end(error)
            return
        reply, _ = future.result()
        if isinstance(reply, Answered):
            batch.settle(reply.answers)
            if batch.failed or reply.error is not None:
                why = center_failed() if batch.failed else from_wire(reply.error)
                batch.settle(dict.fromkeys(range(len(batch.outcomes)), why))
            self._finish(batch)

    def _finish(self, batch: _Batch) -> None:
        if None in batch.outcomes:
            batch.end(restarted())
            self._stream.lose("it left a request without an answer")
        batch.end()

    def _ended(self, batch: _Batch) -> None:
        self._batches.discard(batch)
        self._may_infer.release()

    def _lost(self) -> None:
        """Also those batches fail that the center has: it may compute for ever."""
        for batch in list(self._batches):
            batch.end(restarted())
        self._on_lost()


def _begun(future: Future[T]) -> Future[T]:
    """A future that nobody can cancel: what was sent is answered."""
    future.set_running_or_notify_cancel()
    return future
