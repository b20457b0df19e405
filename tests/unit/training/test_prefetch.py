"""Batches are made while the present one trains: a few ahead, in order, and what goes wrong is told to who asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from caltrain.training.prefetch import DEPTH, Prefetch

SECONDS = 20


class Reader:
    """Makes numbers, and lets a test wait for each."""

    def __init__(self, count: int = 10) -> None:
        self._made = [threading.Event() for _ in range(count)]

    def __iter__(self) -> Iterator[int]:
        for number, made in enumerate(self._made):
            made.set()
            yield number

    def makes(self, number: int) -> bool:
        """Whether that number is made, now or within the time that anything takes."""
        return self._made[number].wait(SECONDS)


def test_the_next_batches_are_made_while_one_is_trained_on() -> None:
    reader = Reader()
    batches = Prefetch(iter(reader))
    for number in batches:
        # This is the training of batch `number`: nobody asks for the next one, and yet it gets made.
        assert reader.makes(min(number + DEPTH, 9))


def test_no_more_than_a_few_are_made_ahead() -> None:
    reader = Reader()
    batches = Prefetch(iter(reader))
    assert next(batches) == 0
    assert reader.makes(DEPTH + 1)
    # The last one made waits for a place; only `next` makes one.
    assert not reader._made[DEPTH + 2].wait(0.05)
    batches.close()


def test_all_come_in_order_and_then_the_end_comes_as_often_as_it_is_asked_for() -> None:
    batches = Prefetch(iter(Reader()))
    assert list(batches) == list(range(10))
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(batches)


def test_what_the_reader_raises_comes_after_the_batches_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 0
        raise ValueError("the host's disk is gone")

    batches = Prefetch(broken())
    assert next(batches) == 0
    for _ in range(2):
        with pytest.raises(ValueError, match="the host's disk is gone"):
            next(batches)


@pytest.mark.parametrize("taken", [0, 1, 5, 10])
def test_closing_ends_the_thread_whatever_was_made(taken: int) -> None:
    batches = Prefetch(iter(Reader()))
    for _ in range(taken):
        next(batches)
    batches.close()
    assert not batches._thread.is_alive()
