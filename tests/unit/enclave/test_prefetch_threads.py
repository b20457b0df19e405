"""Batches made ready by a thread: in order, not too many, and no thread that stays."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from caltrain.errors import EnvironmentFault
from caltrain.training.prefetch import DEPTH, Prefetch


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while any(thread.name == "prefetch" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


class Counted:
    """An endless or ended source that knows how many items were asked of it."""

    def __init__(self, stop: int, error: BaseException | None = None) -> None:
        self.made, self.stop, self.error = 0, stop, error

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> int:
        if self.made == self.stop:
            raise self.error or StopIteration
        self.made += 1
        return self.made - 1


def settled(source: Counted, *, least: int) -> int:
    """How many items were made once `least` are and no more come: the thread may be slow to start on a busy machine."""
    before = -1
    while source.made < least or before != source.made:
        before = source.made
        time.sleep(0.03)
    return before


@pytest.mark.parametrize("count", [0, 1, DEPTH, DEPTH + 1, 50])
def test_items_come_in_order_and_then_the_end(count: int) -> None:
    assert list(Prefetch(iter(range(count)))) == list(range(count))


def test_no_more_are_made_than_the_depth_and_the_one_in_the_threads_hand() -> None:
    source = Counted(100)
    ready = Prefetch(source)
    for taken in range(5):
        assert settled(source, least=taken + DEPTH + 1) == taken + DEPTH + 1
        assert next(ready) == taken
    ready.close()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_the_thread_raises_arrives_after_the_items_before_it(count: int) -> None:
    fault = EnvironmentFault("storage.missing", "no such object", step="read", fix="Send it.")
    ready = Prefetch(Counted(count, fault))
    assert [next(ready) for _ in range(count)] == list(range(count))
    for _ in range(3):  # whoever asks again gets the same answer
        with pytest.raises(EnvironmentFault) as raised:
            next(ready)
        assert raised.value is fault
    ready.close()


def test_after_the_end_it_stays_at_the_end() -> None:
    ready = Prefetch(iter([1]))
    assert next(ready) == 1
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(ready)
    ready.close()


@pytest.mark.parametrize("taken", range(6))
def test_close_ends_the_thread_at_any_moment(taken: int) -> None:
    source = Counted(10**9)
    ready = Prefetch(source)
    for _ in range(taken):
        next(ready)
    ready.close()
    made = source.made
    time.sleep(0.02)
    assert source.made == made
    ready.close()  # a second time changes nothing


def test_close_waits_for_an_item_that_is_being_made() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 0
        begun.set()
        go_on.wait(5)
        yield 1

    ready = Prefetch(source())
    assert next(ready) == 0
    assert begun.wait(5)
    threading.Timer(0.05, go_on.set).start()
    ready.close()


def test_close_after_the_end_and_after_an_error_returns() -> None:
    for source in (iter([1, 2]), Counted(1, ValueError("no"))):
        ready: Prefetch[int] = Prefetch(source)
        next(ready)
        ready.close()
