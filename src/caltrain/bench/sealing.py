"""Sealed shards beside raw AES-GCM and encrypted Parquet: speed with its spread, and what tampering is noticed.

    caltrain bench sealing --format json

`caltrain.bench.ways` says what each way includes. Tasks: `seal` and `read` all rows in order; `shuffled` reads 32
batches of 128 rows in random order out of a memory map (`aes-gcm`: out of one buffer), without commitments.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import msgspec

from caltrain.bench.harness import Clock, Spread, Work, compare
from caltrain.bench.tampering import Tampering, parquet_specimen, shard_specimen, tamper
from caltrain.bench.ways import BASELINE, Ways, random_rows, schema_of
from caltrain.errors import ConfigError

_TAMPERED_ROWS, _TAMPERED_GROUP = 128, 16

Task = Literal["seal", "read", "shuffled"]


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """One way of one task: rows a second, and speed as a multiple of `aes-gcm` in the same round."""

    task: Task
    way: str
    record_bytes: int
    message_bytes: int
    rows: int
    rows_per_second: Spread
    speed: Spread


class SealingReport(msgspec.Struct, frozen=True, kw_only=True):
    """`measures` by size, task and way; `tampering` by format and attack."""

    records: int
    repeats: int
    clock: str
    versions: dict[str, str]
    measures: tuple[Measure, ...]
    tampering: tuple[Tampering, ...]


def run(
    *,
    records: int = 20_000,
    record_bytes: Sequence[int] = (784, 3072),
    repeats: int = 5,
    positions: int = 1000,
    clock: Clock = time.process_time,
) -> SealingReport:
    """Measure `records` random records of each size in bytes of pixels: 784 as MNIST, 3072 as CIFAR.

    Tampering is tried on files of 128 records of the first size, with bits flipped at `positions` places. The clock
    is by default the processor's time of this process, all its threads together. Raises ConfigError `bench.bounds`,
    `bench.no-parquet`, and what `harness.compare` raises.
    """
    _check("sizes", len(record_bytes), 1, 16)
    _check("records", records, 100, 1_000_000)
    _check("positions", positions, 2, 1_000_000)
    for size in record_bytes:
        _check("record_bytes", size, 16, 4096)
    return SealingReport(
        records=records,
        repeats=repeats,
        clock=getattr(clock, "__name__", "unknown"),
        versions={
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{package: version(package) for package in ("caltrain", "cryptography", "pyarrow")},
        },
        measures=tuple(m for size in record_bytes for m in _measures(size, records, repeats, clock)),
        tampering=_tampering(record_bytes[0], positions),
    )


def _measures(record_bytes: int, records: int, repeats: int, clock: Clock) -> list[Measure]:
    ways = Ways(record_bytes, records)

    def timed(task: Task, work: dict[str, Work], rows: int) -> list[Measure]:
        return [
            Measure(
                task=task,
                way=timing.name,
                record_bytes=record_bytes,
                message_bytes=ways.message_bytes,
                rows=rows,
                rows_per_second=Spread.of([rows / seconds for seconds in timing.rounds]),
                speed=timing.speed,
            )
            for timing in compare(work, baseline=BASELINE, repeats=repeats, clock=clock)
        ]

    measures = timed("seal", ways.seal(), records) + timed("read", ways.read(), records)
    with ways.shuffled() as (work, rows):
        return measures + timed("shuffled", work, rows)


def _tampering(record_bytes: int, positions: int) -> tuple[Tampering, ...]:
    rows, others = (random_rows(record_bytes, _TAMPERED_ROWS, seed=seed) for seed in (2, 3))
    specimens = (
        shard_specimen(schema_of(record_bytes), rows, others),
        parquet_specimen("direct", rows, others, group=_TAMPERED_GROUP),
        parquet_specimen("kms", rows, others, group=_TAMPERED_GROUP),
    )
    return tuple(outcome for specimen in specimens for outcome in tamper(specimen, positions=positions))


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(
            "bench.bounds",
            f"a measurement cannot be made: {name} is {value}",
            step="bench sealing",
            fix=f"Give {low} to {high}.",
        )
