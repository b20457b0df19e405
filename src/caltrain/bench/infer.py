"""Protected inference beside plain PyTorch behind the same HTTP server: throughput, waits, and their ratio.

    caltrain bench infer --format json

Both servers run at once and take turns, round by round: the same model, cores, threads, queue, batches, protocol. The
plain one computes the whole model in its own process and seals nothing. Closed-loop clients in this process ask both
about one record at a time. A ratio is that of one round: what slows the machine in a round slows both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import msgspec

from caltrain.bench.harness import Spread
from caltrain.bench.load import Load, closed_loop
from caltrain.bench.serving_pair import (
    Contest,
    Server,
    grant_key,
    open_plain,
    plain_clients,
    protected_clients,
    serving,
)
from caltrain.bench.serving_process import Way
from caltrain.errors import ConfigError

WAYS: tuple[Way, ...] = ("plain", "protected")
OnRound = Callable[[], None]


class InferenceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One cut and concurrency. Figures are medians over rounds, `ratio` protected over plain throughput of a round."""

    model: str
    cut: int
    head: int
    form: str
    across: str
    batch: int
    fixed: bool
    threads: int
    concurrency: int
    rounds: int
    seconds_a_round: float
    plain_rps: float
    protected_rps: float
    ratio: float
    ratio_spread: Spread
    plain_p50_ms: float
    protected_p50_ms: float
    added_p50_ms: float
    plain_p99_ms: float
    protected_p99_ms: float
    peak_rss_mb: float
    plain_peak_rss_mb: float
    simulated: bool = True


def run(
    contest: Contest, *, concurrency: Sequence[int], rounds: int, seconds: float, on_round: OnRound = lambda: None
) -> list[InferenceReport]:
    """Measure. Raises ConfigError `bench.bounds`, EnvironmentFault `bench.worker-died`, and what asking raises."""
    if not (1 <= rounds <= 1000 and 0.5 <= seconds <= 600 and all(1 <= n <= 512 for n in concurrency)):
        raise ConfigError(
            "bench.bounds",
            f"{rounds} rounds of {seconds:g} s with {', '.join(map(str, concurrency))} clients",
            step="bench infer",
            fix="Ask for 1 to 1000 rounds of 0.5 to 600 s with 1 to 512 clients.",
        )
    with serving(contest, "plain") as plain, serving(contest, "protected") as protected:
        servers = {"plain": plain, "protected": protected}
        grant_key(contest, protected.url)
        open_plain(contest, plain.url)
        loads = asyncio.run(_measure(contest, servers, concurrency, rounds, seconds, on_round))
        peaks = {way: servers[way].peak_rss_mb() for way in WAYS}
    return [_report(contest, clients, loads[clients], peaks, rounds, seconds) for clients in concurrency]


Loads = dict[Way, list[Load]]


async def _measure(
    contest: Contest,
    servers: dict[str, Server],
    concurrency: Sequence[int],
    rounds: int,
    seconds: float,
    on_round: OnRound,
) -> dict[int, Loads]:
    """The loads of each way by number of clients, after one round of each that does not count."""
    found: dict[int, Loads] = {}
    for clients in concurrency:
        loads: Loads = {"plain": [], "protected": []}
        async with AsyncExitStack() as stack:
            asks = {
                "plain": await stack.enter_async_context(plain_clients(contest, servers["plain"].url)),
                "protected": await stack.enter_async_context(
                    protected_clients(contest, servers["protected"].url, clients)
                ),
            }
            for turn in range(rounds + 1):
                for way in WAYS if turn % 2 else WAYS[::-1]:
                    load = await closed_loop(asks[way], clients=clients, seconds=seconds, clock=time.perf_counter)
                    if turn:
                        loads[way].append(load)
                on_round()
        found[clients] = loads
    return found


def _report(
    contest: Contest, clients: int, loads: Loads, peaks: dict[Way, float], rounds: int, seconds: float
) -> InferenceReport:
    package = contest.manifest()
    terms = package.terms

    def middle(way: Way, figure: str) -> float:
        return round(Spread.of([getattr(load, figure) for load in loads[way]]).median, 2)

    pairs = list(zip(loads["plain"], loads["protected"], strict=True))
    ratio = Spread.of([protected.rps / plain.rps for plain, protected in pairs])
    added = Spread.of([protected.p50_ms - plain.p50_ms for plain, protected in pairs])
    return InferenceReport(
        model=contest.name,
        cut=terms.front,
        head=terms.head,
        form=package.form,
        across=terms.across,
        batch=terms.batch.rows,
        fixed=terms.batch.fixed,
        threads=contest.threads,
        concurrency=clients,
        rounds=rounds,
        seconds_a_round=seconds,
        plain_rps=middle("plain", "rps"),
        protected_rps=middle("protected", "rps"),
        ratio=round(ratio.median, 4),
        ratio_spread=ratio,
        plain_p50_ms=middle("plain", "p50_ms"),
        protected_p50_ms=middle("protected", "p50_ms"),
        added_p50_ms=round(added.median, 2),
        plain_p99_ms=middle("plain", "p99_ms"),
        protected_p99_ms=middle("protected", "p99_ms"),
        peak_rss_mb=round(peaks["protected"], 1),
        plain_peak_rss_mb=round(peaks["plain"], 1),
    )
