"""Named pieces of work timed side by side: in one process, on the same data, interleaved, in pairs.

A shared machine changes its pace from second to second, so a figure alone says little. Every round runs all pieces
once, in alternating order; a piece's speed is its baseline's time over its own *in the same round*. What slows a
whole round down cancels, what is left is the spread, and it is reported with the median.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from caltrain.errors import ConfigError

MAX_REPEATS = 1000

Work = Callable[[], object]
Clock = Callable[[], float]


class Spread(msgspec.Struct, frozen=True):
    """Smallest, middle and largest of some figures."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of at least one figure."""
        return cls(min(values), statistics.median(values), max(values))


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work: seconds of each round, in order, and its speed as a multiple of the baseline's."""

    name: str
    rounds: tuple[float, ...]
    seconds: Spread
    speed: Spread


def compare(
    work: Mapping[str, Work], *, baseline: str, repeats: int, clock: Clock = time.perf_counter
) -> tuple[Timing, ...]:
    """Run all of `work` once unmeasured, then `repeats` times measured; timings in the order of `work`.

    `clock` gives seconds: `time.perf_counter` for what a user waits, `time.process_time` for the processor's time
    of all threads of this process, which other programs' load changes less. Raises ConfigError `bench.repeats`,
    `bench.no-baseline`, `bench.too-short`.
    """
    if not 1 <= repeats <= MAX_REPEATS:
        raise _refuse("bench.repeats", f"{repeats} repeats", f"Ask for 1 to {MAX_REPEATS}.")
    if baseline not in work:
        raise _refuse("bench.no-baseline", f"no work is called {baseline!r}", f"Name one of {', '.join(work)}.")
    for piece in work.values():
        piece()
    names = list(work)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            rounds[name].append(_seconds(name, work[name], clock))
    return tuple(_timing(name, rounds[name], rounds[baseline]) for name in names)


def _seconds(name: str, piece: Work, clock: Clock) -> float:
    gc.collect()  # else one piece pays for the garbage of the piece before it
    start = clock()
    piece()
    spent = clock() - start
    if spent <= 0:
        raise _refuse("bench.too-short", f"{name!r} took no time that the clock can see", "Give it more work.")
    return spent


def _timing(name: str, own: Sequence[float], base: Sequence[float]) -> Timing:
    speed = Spread.of([b / o for b, o in zip(base, own, strict=True)])
    return Timing(name=name, rounds=tuple(own), seconds=Spread.of(own), speed=speed)


def _refuse(code: str, what: str, fix: str) -> ConfigError:
    return ConfigError(code, f"a measurement cannot be made: {what}", step="compare", fix=fix)
