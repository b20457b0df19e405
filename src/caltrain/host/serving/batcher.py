"""Requests of all sessions, computed together: who waits is taken as soon as a place is free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from caltrain.errors import CaltrainError, EnvironmentFault
from caltrain.host.serving.faults import Outcome, busy
from caltrain.serving.package import MAX_BATCH_BYTES

QUEUED_BATCHES = 8
_ASK_AFTER = 0.1
Gone = Callable[[], Awaitable[bool]]


class Runner(Protocol):
    """Computes batches."""

    slots: int
    """How many batches it works on at a time."""
    most_rows: int

    async def run(self, batch: list[bytes]) -> list[Outcome]:
        """An answer or an error for each request, in their order."""

    def rows_of(self, frame: bytes) -> int:
        """Records of a request. Raises DataError `request.rows`."""


@dataclass(eq=False)
class _Waiting:
    """A request in the queue. `gone` says whether nobody waits for its answer any more."""

    frame: bytes
    rows: int
    since: float
    gone: Gone | None
    answer: asyncio.Future[bytes]


class Batcher:
    """A bounded queue before a runner. Used in one event loop. `on_batch` hears of each batch's records."""

    def __init__(
        self, runner: Runner, *, delay_ms: float = 0.0, on_batch: Callable[[int], None] = lambda _: None
    ) -> None:
        self._runner, self._delay, self._on_batch = runner, delay_ms / 1000, on_batch
        self._queue: deque[_Waiting] = deque()
        self._free, self.rows = runner.slots, 0
        self._look: asyncio.Handle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._queue and not self._tasks

    async def submit(self, frame: bytes, *, gone: Gone | None = None) -> bytes:
        """The answer to one request. Raises its error; DataError `request.rows`, EnvironmentFault `serving.busy`."""
        rows = self._runner.rows_of(frame)
        if self.rows + rows > QUEUED_BATCHES * self._runner.most_rows:
            raise busy(f"{self.rows} records are waiting already")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(frame, rows, loop.time(), gone, loop.create_future())
        self._queue.append(waiting)
        self.rows += rows
        if self.rows >= self._runner.most_rows:
            self._look_now()
        else:
            self._look_soon(loop)
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self.rows -= rows
            raise

    def fail(self, error: CaltrainError) -> None:
        """Everything that waits ends with this error."""
        for waiting in self._take(everything=True):
            _settle(waiting, error)

    def _look_soon(self, loop: asyncio.AbstractEventLoop, delay: float = 0.0) -> None:
        """Look when whatever arrived together is in the queue, or once the oldest has waited long enough."""
        if self._look is None:
            self._look = loop.call_later(delay, self._pump) if delay else loop.call_soon(self._pump)

    def _look_now(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        self._look_soon(asyncio.get_running_loop())

    def _pump(self) -> None:
        self._look = None
        loop = asyncio.get_running_loop()
        while self._free and self._queue:
            if self._delay and self.rows < self._runner.most_rows:
                left = self._queue[0].since + self._delay - loop.time()
                if left > 0:
                    self._look_soon(loop, left)
                    return
            self._free -= 1
            task = loop.create_task(self._run(self._take()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _take(self, *, everything: bool = False) -> list[_Waiting]:
        taken: list[_Waiting] = []
        rows = size = 0
        while self._queue:
            head = self._queue[0]
            rows, size = rows + head.rows, size + len(head.frame)
            if taken and not everything and (rows > self._runner.most_rows or size > MAX_BATCH_BYTES):
                break
            self.rows -= head.rows
            taken.append(self._queue.popleft())
        return taken

    async def _run(self, batch: list[_Waiting]) -> None:
        try:
            batch = await self._still_there(batch)
            if batch:
                self._on_batch(sum(waiting.rows for waiting in batch))
                outcomes = await self._runner.run([waiting.frame for waiting in batch])
                for waiting, outcome in zip(batch, outcomes, strict=True):
                    _settle(waiting, outcome)
        except CaltrainError as error:
            for waiting in batch:
                _settle(waiting, error)
        except Exception as error:  # noqa: BLE001  # whatever the runner does, nobody waits for ever
            for waiting in batch:
                _settle(waiting, _failed(error))
        finally:
            self._free += 1
            if self._queue:
                self._look_now()

    async def _still_there(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Those whose callers have not gone away; only who waited long is asked for."""
        now = asyncio.get_running_loop().time()
        kept = []
        for waiting in batch:
            late = waiting.gone is not None and now - waiting.since > _ASK_AFTER
            if waiting.answer.done() or (late and waiting.gone is not None and await waiting.gone()):
                waiting.answer.cancel()
            else:
                kept.append(waiting)
        return kept


def _settle(waiting: _Waiting, outcome: Outcome) -> None:
    if waiting.answer.done():  # its caller has gone
        return
    if isinstance(outcome, CaltrainError):
        waiting.answer.set_exception(outcome)
    else:
        waiting.answer.set_result(outcome)


def _failed(error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        "serving.failed",
        f"the host failed unexpectedly: {type(error).__name__}",
        step="infer",
        fix="Try again; if it repeats, report it with the server's log.",
    )
