"""Batches made ready by a thread while the present one trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
DEPTH = 2


class _End:
    """What ends the queue: the iterator's end, or the error that it raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetch(Generic[T]):
    """An iterator whose next items a thread makes, at most `DEPTH` ahead. What the thread raises, `next` raises."""

    def __init__(self, source: Iterator[T]) -> None:
        self._ready: queue.Queue[T | _End] = queue.Queue(DEPTH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, _End):
            self._ready.put(item)  # whoever asks again gets the same answer
            raise item.error or StopIteration
        return item

    def stop(self) -> None:
        """Have the thread ask for nothing more; it may still be at its present item."""
        self._stopped.set()

    def close(self) -> None:
        """Stop the thread, whatever it had made ready, and wait for its end."""
        self.stop()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.01)

    def _fill(self, source: Iterator[T]) -> None:
        end = _End(None)
        try:
            for item in source:
                if self._stopped.is_set():
                    return
                self._ready.put(item)
        except BaseException as error:  # noqa: BLE001  # it belongs to the thread that asks for the batch
            end = _End(error)
        self._ready.put(end)
