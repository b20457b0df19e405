"""The benchmark runs, reports every task, way and attack, and refuses sizes out of bounds. No time is judged."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from caltrain.bench.sealing import SealingReport, run
from caltrain.errors import ConfigError
from support.samples import refused

PARQUET = {"parquet-16", "parquet-128", "parquet-1024"}
IN_ORDER = {"aes-gcm", "aes-gcm+sha256", "frames", "shard"} | PARQUET
WAYS = {"seal": IN_ORDER, "read": IN_ORDER, "shuffled": {"aes-gcm", "frames"} | PARQUET}


@pytest.fixture(scope="module")
def report() -> SealingReport:
    return run(records=100, record_bytes=(16, 40), repeats=2, positions=2)


def test_every_way_of_every_task_is_measured_at_every_size(report: SealingReport) -> None:
    found = [(m.record_bytes, m.task, m.way) for m in report.measures]
    expected = {(size, task, way) for size in (16, 40) for task, ways in WAYS.items() for way in ways}
    assert set(found) == expected
    assert len(found) == len(expected)
    assert {m.message_bytes - m.record_bytes for m in report.measures} == {22 + 32}  # the record's head and its salt
    assert {m.rows for m in report.measures} == {100}


def test_figures_come_with_their_spread(report: SealingReport) -> None:
    for measure in report.measures:
        for spread in (measure.rows_per_second, measure.speed):
            assert 0 < spread.minimum <= spread.median <= spread.maximum
    assert {m.speed.median for m in report.measures if m.way == "aes-gcm"} == {1.0}


def test_every_format_meets_every_attack(report: SealingReport) -> None:
    formats = ("shard", "parquet-direct", "parquet-kms")
    attacks = ("flip", "truncate", "swap", "splice", "replay")
    assert [(t.format, t.attack) for t in report.tampering] == list(itertools.product(formats, attacks))
    assert all(t.noticed == t.tried for t in report.tampering if t.format == "shard")


def test_the_report_says_what_it_was_made_with_and_goes_through_json(report: SealingReport) -> None:
    assert (report.records, report.repeats, report.clock) == (100, 2, "process_time")
    assert {"python", "cryptography", "pyarrow"} <= set(report.versions)
    assert msgspec.json.decode(msgspec.json.encode(report), type=SealingReport) == report


@pytest.mark.parametrize(
    "wrong",
    [
        {"records": 99},
        {"records": 1_000_001},
        {"record_bytes": ()},
        {"record_bytes": (16,) * 17},
        {"record_bytes": (784, 15)},
        {"record_bytes": (4097,)},
        {"positions": 1},
        {"positions": 1_000_001},
    ],
    ids=str,
)
def test_sizes_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    with refused(ConfigError, "bench.bounds"):
        run(**wrong)


def test_no_repeats_are_refused() -> None:
    with refused(ConfigError, "bench.repeats"):
        run(records=100, record_bytes=(16,), repeats=0)
