"""Closed-loop clients: each asks, waits for the answer, and asks again."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from caltrain.errors import ConfigError

Ask = Callable[[int], Awaitable[None]]
_TOGETHER = 0.01


@dataclass(frozen=True)
class Load:
    """When the answers came (seconds from the start, ascending), and how long each was waited for (ms)."""

    came: tuple[float, ...]
    waited_ms: tuple[float, ...]

    @property
    def rps(self) -> float:
        """Answers a second, from the first ones to the last: answers of one batch come together."""
        first, last = self.came[0], self.came[-1]
        return sum(time > first + _TOGETHER for time in self.came) / (last - first)

    @property
    def p50_ms(self) -> float:
        """Median wait."""
        return statistics.median(self.waited_ms)

    @property
    def p99_ms(self) -> float:
        """The wait that one request in a hundred exceeds."""
        return sorted(self.waited_ms)[min(len(self.waited_ms) - 1, int(0.99 * len(self.waited_ms)))]


async def closed_loop(ask: Ask, *, clients: int, seconds: float, clock: Callable[[], float]) -> Load:
    """Let `clients` ask for `seconds` and wait for what they asked. `ask` is given the client's number.

    Raises ConfigError `bench.too-short` for less than three answers.
    """
    answers: list[tuple[float, float]] = []
    began = clock()

    async def client(number: int) -> None:
        while (start := clock()) - began < seconds:
            await ask(number)
            end = clock()
            if end - began <= seconds:
                answers.append((end - began, (end - start) * 1000))

    await asyncio.gather(*(client(number) for number in range(clients)))
    if len(answers) < 3:
        raise ConfigError(
            "bench.too-short",
            f"{len(answers)} answers in {seconds:g} s",
            step="bench infer",
            fix="Give more --seconds.",
        )
    came, waited = zip(*sorted(answers), strict=True)
    return Load(came, waited)
