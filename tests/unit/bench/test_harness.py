"""The harness: pieces of work in turns, each beside its baseline of the same round. The clock is a made-up one."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest

from caltrain.bench.harness import MAX_REPEATS, Spread, Work, compare
from caltrain.errors import ConfigError
from support.samples import refused


class Bench:
    """A clock that only work moves, and a log of what ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float]) -> Work:
        """A piece that takes `seconds(n)` when it runs for the n-th time; the run before the first round is the 0th."""
        runs = 0

        def piece() -> None:
            nonlocal runs
            self.log.append(name)
            self.now += seconds(runs)
            runs += 1

        return piece


def test_rounds_alternate_their_order_after_one_unmeasured_run() -> None:
    bench = Bench()
    work = {name: bench.work(name, lambda _: 1.0) for name in "abc"}
    compare(work, baseline="a", repeats=3, clock=bench.clock)
    assert "".join(bench.log) == "abc" + "abc" + "cba" + "abc"


def test_the_unmeasured_run_counts_nowhere() -> None:
    bench = Bench()
    work = {"a": bench.work("a", lambda run: 2.0 if run else 100.0)}
    (timing,) = compare(work, baseline="a", repeats=2, clock=bench.clock)
    assert timing.rounds == (2.0, 2.0)


def test_a_machine_that_slows_down_changes_no_speed() -> None:
    bench = Bench()
    work = {"base": bench.work("base", lambda run: 1.0 + run), "other": bench.work("other", lambda run: 4.0 + 4 * run)}
    base, other = compare(work, baseline="base", repeats=4, clock=bench.clock)
    assert base.seconds == Spread(2.0, 3.5, 5.0)
    assert base.speed == Spread(1.0, 1.0, 1.0)
    assert other.speed == Spread(0.25, 0.25, 0.25)


def test_speed_and_seconds_come_with_their_spread() -> None:
    bench = Bench()
    spent = (0.0, 4.0, 1.0, 2.0)
    work = {"other": bench.work("other", lambda run: spent[run]), "base": bench.work("base", lambda _: 2.0)}
    other, base = compare(work, baseline="base", repeats=3, clock=bench.clock)
    assert [timing.name for timing in (other, base)] == ["other", "base"]
    assert other.rounds == (4.0, 1.0, 2.0)
    assert other.seconds == Spread(1.0, 2.0, 4.0)
    assert other.speed == Spread(0.5, 1.0, 2.0)


def test_garbage_of_one_piece_is_gone_before_the_next_starts() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    left: list[weakref.ref[Node]] = []
    survived: list[bool] = []
    bench = Bench()
    tick = bench.work("tick", lambda _: 1.0)

    def litter() -> None:
        left[:] = [weakref.ref(Node())]
        tick()

    def look() -> None:
        survived.append(left[0]() is not None)
        tick()

    compare({"litter": litter, "look": look}, baseline="look", repeats=1, clock=bench.clock)
    assert survived == [True, False]  # the unmeasured run shows that the litter does lie about


@pytest.mark.parametrize(
    ("baseline", "repeats", "code"),
    [
        ("a", 0, "bench.repeats"),
        ("a", MAX_REPEATS + 1, "bench.repeats"),
        ("b", 1, "bench.no-baseline"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(baseline: str, repeats: int, code: str) -> None:
    bench = Bench()
    with refused(ConfigError, code):
        compare({"a": bench.work("a", lambda _: 1.0)}, baseline=baseline, repeats=repeats, clock=bench.clock)
    assert bench.log == []


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_work_that_the_clock_cannot_see_is_refused(seconds: float) -> None:
    bench = Bench()
    with refused(ConfigError, "bench.too-short"):
        compare({"a": bench.work("a", lambda _: seconds)}, baseline="a", repeats=1, clock=bench.clock)
