"""The benchmark runs, finds what a scan finds, and reports every key. No time is judged."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caltrain.bench.trace import TraceReport, run
from caltrain.errors import ConfigError

KEYS = {
    *("records", "dims", "classes", "p50_ms", "p95_ms", "recall_at_9", "faiss_flat_p50_ms", "ratio_to_faiss"),
    *("bytes_per_record", "build_seconds", "ratio_to_best", "best", "unseal_seconds"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> TraceReport:
    pytest.importorskip("faiss", reason="faiss is not installed (extra: accountability)")
    folder = tmp_path_factory.mktemp("bench")
    found = run(records=4000, dims=32, classes=3, rounds=3, judged=5, folder=folder)
    assert list(folder.iterdir()) == []
    return found


def test_every_key_is_reported(report: TraceReport) -> None:
    assert set(msgspec.to_builtins(report)) >= KEYS
    assert (report.records, report.dims, report.classes, report.class_records) == (4000, 32, 3, 1334)
    assert set(report.peers_p50_ms) == {"faiss flat", "faiss sharded", "faiss fp16", "torch"}


def test_the_store_finds_what_a_scan_finds(report: TraceReport) -> None:
    assert report.recall_at_9 == 1.0
    assert report.bytes_per_record <= 2 * 32 + 64


def test_ratios_are_to_the_fastest(report: TraceReport) -> None:
    peers = report.peers_p50_ms
    assert peers[report.best] == min(peers.values())
    assert report.ratio_to_best == peers[report.best] / report.p50_ms
    assert report.ratio_to_faiss == min(peers["faiss flat"], peers["faiss sharded"]) / report.p50_ms
    assert report.p95_ms >= report.p50_ms


def test_seconds_are_told_by_the_clock_that_is_given() -> None:
    pytest.importorskip("faiss", reason="faiss is not installed (extra: accountability)")
    ticks = itertools.count()
    found = run(records=40, dims=8, classes=2, rounds=2, judged=1, clock=lambda: float(next(ticks)))
    assert (found.build_seconds, found.unseal_seconds, found.p50_ms, found.ratio_to_best) == (1.0, 1.0, 1000.0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"records": 0}, {"dims": 0}, {"dims": 5000}, {"threads": 0}, {"classes": 0}, {"records": 80, "classes": 9}],
)
def test_sizes_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed (extra: accountability)")
    with pytest.raises(ConfigError) as raised:
        run(**wrong)
    assert raised.value.code == "bench.bounds"


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError) as raised:
        run(records=40, folder=tmp_path)
    assert raised.value.code == "bench.no-faiss"
    assert list(tmp_path.iterdir()) == []
