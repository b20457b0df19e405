"""The inference benchmark: loads, the plain server beside the protected one, and one small contest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caltrain.bench.contest import contest, subject_for, sweep_of
from caltrain.bench.infer import run
from caltrain.bench.load import Load, closed_loop
from caltrain.bench.plain_server import HEAD, PlainEnclave
from caltrain.boundary.serving import CloseSession, Grant, OpenSession
from caltrain.cli.app import run as command
from caltrain.cli.output import Format, choose
from caltrain.crypto.aead import TAG_BYTES
from caltrain.errors import ConfigError
from caltrain.models.spec import Partition, zone_ranges
from caltrain.serving.folder import open_folder
from caltrain.serving.package import BatchSpec
from support.exposed import subject
from support.samples import refused, signer

KEYS = {
    *("model", "cut", "form", "concurrency", "plain_rps", "protected_rps", "ratio", "plain_p50_ms", "protected_p50_ms"),
    *("added_p50_ms", "plain_p99_ms", "protected_p99_ms", "peak_rss_mb"),
}


def test_the_rate_leaves_out_the_answers_that_came_with_the_first() -> None:
    load = Load((1.0, 1.001, 1.002, 2.0, 2.001, 3.0, 3.0), (10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0))
    assert load.rps == pytest.approx(4 / 2)
    assert (load.p50_ms, load.p99_ms) == (40.0, 70.0)


class Clock:
    """Goes on by what is waited for."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def ask(self, seconds: float) -> Callable[[int], Awaitable[None]]:
        async def wait(_: int) -> None:
            self.now += seconds
            await asyncio.sleep(0)

        return wait


def test_every_client_asks_again_when_it_was_answered_until_the_time_is_over() -> None:
    clock = Clock()
    load = asyncio.run(closed_loop(clock.ask(0.25), clients=1, seconds=2.0, clock=clock))
    assert load.came == tuple(0.25 * number for number in range(1, 9))
    assert set(load.waited_ms) == {250.0}


def test_a_load_without_answers_is_refused() -> None:
    clock = Clock()
    with refused(ConfigError, "bench.too-short"):
        asyncio.run(closed_loop(clock.ask(5), clients=1, seconds=2.0, clock=clock))


@pytest.mark.parametrize("fixed", [False, True])
def test_the_plain_server_answers_as_the_model(fixed: bool, tmp_path: Path) -> None:
    made = contest(
        subject(),
        name="tiny",
        front=2,
        head=1,
        mapped=False,
        batch=BatchSpec(rows=16, fixed=fixed),
        across="f32",
        threads=1,
    )
    with made as pair:
        package = open_folder(pair.package, pair.owner.public).package
        enclave = PlainEnclave(subject(), package, threads=1)
        opened = enclave.ask(OpenSession(signer("una").sign("session", {}))).result()
        assert (len(opened.session), opened.sealed) == (32, opened.session.encode())
        granted = enclave.ask(Grant(signer("owner").sign("grant", {}))).result()
        assert granted.signed is not None
        assert enclave.ask(CloseSession(opened.session)).result().session == ""
        records = np.random.default_rng(0).integers(0, 256, (3, 1, 10, 10)).astype(np.uint8)
        frames = [bytes(HEAD) + part.tobytes() + bytes(TAG_BYTES) for part in (records[:2], records[2:])]
        answers = enclave.infer(frames).result()
        enclave.stop()
    found = np.concatenate([np.frombuffer(a, "<f4").reshape(-1, 4) for a in answers if isinstance(a, bytes)])
    with torch.inference_mode():
        expected = subject().logits(subject().pictures(torch.from_numpy(records))).softmax(1).numpy()
    assert np.allclose(found, expected, atol=1e-6)


def test_a_sweep_is_spread_over_all_cuts_that_leave_a_center() -> None:
    spec = subject_for("cifar10-18-layer").spec
    cuts = sweep_of(spec, 2, most=5)
    assert cuts[0] == 1
    assert len(cuts) <= 5
    for cut in cuts:
        assert len(zone_ranges(spec, Partition(front=cut, head=2))[1]) > 0


@pytest.mark.parametrize(
    "asked", [{"rounds": 0}, {"seconds": 0.1}, {"concurrency": [0]}, {"concurrency": [1000]}, {"seconds": float("nan")}]
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(asked: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"concurrency": [1], "rounds": 1, "seconds": 1.0}
    with refused(ConfigError, "bench.bounds"):
        run(None, **(usual | asked))  # type: ignore[arg-type]


@pytest.mark.processes
def test_a_small_contest_has_all_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ("--model", "digits", "--cut", "2", "--head", "1", "--rounds", "1", "--seconds", "0.5", "--threads", "1")
    plot = tmp_path / "cost.svg"
    try:
        code = command(["bench", "infer", *small, "--concurrency", "2", "--plot", str(plot), "--format", "json"])
    finally:
        choose(Format.TEXT)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert code == 0
    assert set(row) >= KEYS
    assert (row["form"], row["concurrency"], row["simulated"]) == ("ternary", 2, True)
    assert row["ratio"] > 0
    assert row["ratio_spread"]["minimum"] - 1e-4 <= row["ratio"] <= row["ratio_spread"]["maximum"] + 1e-4
    assert row["peak_rss_mb"] > row["plain_peak_rss_mb"] > 50
    assert plot.read_text().startswith("<svg")
