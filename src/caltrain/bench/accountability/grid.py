"""The grid: which cases at which shares and seeds, two at a time, and the report.

    caltrain bench accountability --data cifar10 --format json

Trained models and answers are kept, so what was interrupted goes on where it was, and a changed verdict is judged again
on the same models.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import TypeVar

import msgspec

from caltrain.bench.accountability.figures import Figures, figures
from caltrain.bench.accountability.jobs import OURS, Done, Job, Where, perform, prepare, repair
from caltrain.bench.accountability.noise import NOISES
from caltrain.bench.accountability.planting import CASES, CLEAN, HOST, SHARES, case
from caltrain.bench.accountability.remedy import Repair

CLEAN_RUNS = 10  # of the full grid
FULL_SEEDS = 3
MORE = ("sinusoidal-clean", "framing-trigger")  # variants, left to the full grid
_USUAL = 0.01
OnRound = Callable[[int, int], None]
Result = TypeVar("Result")


class CaseReport(Figures, frozen=True, kw_only=True):
    """One case at one share: our figures. `accuracy` and `attack_success` are the models', `peers` the others'."""

    case: str
    share: float | None
    runs: int
    accuracy: float
    attack_success: float | None
    peers: dict[str, Figures]


class AccountabilityReport(msgspec.Struct, frozen=True, kw_only=True):
    """All cases of one data set, and, where it was asked for, what leaving the blamed records out repairs."""

    data: str
    seeds: tuple[int, ...]
    cases: tuple[CaseReport, ...]
    remedy: dict[str, tuple[Repair, ...]] | None = None


def jobs_of(
    *, cases: Sequence[str] = (), shares: Sequence[float] = (), seeds: int | None = None, full: bool = False
) -> list[Job]:
    """What is to be done, in order: all cases of a seed before the next one.

    By default all cases but `MORE` once, with 1 % of the records tampered with, and label noise at its stated rates.
    `full` is all of them, three seeds, ten clean ones, all shares, label noise at shares too. Raises ConfigError
    (`planting.case`).
    """
    count = seeds if seeds is not None else FULL_SEEDS if full else 1
    at = tuple(shares) or (SHARES if full else (_USUAL,))
    names = tuple(cases) or tuple(name for name in CASES if full or name not in MORE)
    found: list[Job] = []
    for seed in range(max(count, CLEAN_RUNS if full and seeds is None else 0)):
        for name in names:
            if seed >= count and name != CLEAN:
                continue
            found += [Job(*case(name, share), seed) for share in _shares(name, at, full=full)]
    return found


def _shares(name: str, shares: Sequence[float], *, full: bool) -> Iterable[float | None]:
    if name in (CLEAN, HOST):
        return (None,)
    if name in NOISES:
        return (None, *shares) if full else (None,)
    return shares


def run(
    where: Where, jobs: Sequence[Job], *, processes: int = 2, remedy: bool = False, on_round: OnRound | None = None
) -> AccountabilityReport:
    """Do all of it, `processes` at a time, each with one thread.

    Raises what planting, training and the methods raise; what was done before is kept.
    """
    spoilt = _spoilt(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        ticks = _counted(rounds(jobs, remedy=remedy), on_round)
        try:
            _all([pool.submit(prepare, where, seed) for seed in spoilt], ticks)
            done = _all([pool.submit(perform, where, job) for job in jobs], ticks)
            repairs = _all([pool.submit(repair, where, job) for job in jobs], ticks) if remedy else []
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return AccountabilityReport(
        data=where.data,
        seeds=tuple(sorted({job.seed for job in jobs})),
        cases=tuple(_report(found) for found in _by_case(done)),
        remedy=_by_name(jobs, repairs) if remedy else None,
    )


def rounds(jobs: Sequence[Job], *, remedy: bool) -> int:
    """How many pieces of work that is."""
    return len(_spoilt(jobs)) + len(jobs) * (2 if remedy else 1)


def _spoilt(jobs: Sequence[Job]) -> list[int]:
    return sorted({job.seed for job in jobs if job.name in NOISES})


def _counted(total: int, on_round: OnRound | None) -> Iterator[None]:
    for done in range(1, total + 1):
        if on_round is not None:
            on_round(done, total)
        yield


def _all(futures: list[Future[Result]], ticks: Iterator[None]) -> list[Result]:
    for future in as_completed(futures):
        future.result()  # the first failure ends the grid
        next(ticks, None)
    return [future.result() for future in futures]


def _by_case(done: Sequence[Done]) -> Iterator[list[Done]]:
    kinds = dict.fromkeys((found.job.name, found.job.share) for found in done)
    for kind in kinds:
        yield [found for found in done if (found.job.name, found.job.share) == kind]


def _report(found: Sequence[Done]) -> CaseReport:
    job, success = found[0].job, [each.success for each in found if each.success is not None]
    by_method = {name: figures([each.tallies[name] for each in found]) for name in found[0].tallies}
    return CaseReport(
        **msgspec.structs.asdict(by_method.pop(OURS)),
        case=job.name,
        share=job.share,
        runs=len(found),
        accuracy=sum(each.accuracy for each in found) / len(found),
        attack_success=sum(success) / len(success) if success else None,
        peers=by_method,
    )


def _by_name(jobs: Sequence[Job], repairs: Sequence[Repair | None]) -> dict[str, tuple[Repair, ...]]:
    found: dict[str, tuple[Repair, ...]] = {}
    for job, made in zip(jobs, repairs, strict=True):
        if made is not None:
            name = str(case(job.name, job.share))
            found[name] = (*found.get(name, ()), made)
    return found
