"""The host's log in the tools that people watch with: every line once, whatever the host sends bounded and typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from caltrain.errors import ConfigError, ProtocolError
from caltrain.host_client import HostClient
from caltrain.reports import tracking
from caltrain.reports.tracking import Follower, Sink, open_sinks
from support.samples import refused

STEP = b'{"time":10.0,"epoch":2,"step":5,"steps":40,"loss":1.5,"images_per_second":31.5}\n'
EPOCH = b'{"time":20.0,"epoch":2,"loss":1.25,"held_out":{"records":9,"loss":1.0,"top1":0.5,"top2":0.75}}\n'


class FakeHost:
    """Serves the tail of a log that grows."""

    def __init__(self) -> None:
        self.log = b""
        self.asked: list[int] = []

    def tail(self, name: str, *, offset: int, limit: int) -> bytes:
        assert (name, limit) == ("log.jsonl", tracking.MAX_LOG)
        self.asked.append(offset)
        return self.log[offset:]


class Seen:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, float], int, float]] = []

    def log(self, figures: dict[str, float], *, step: int, seconds: float) -> None:
        self.got.append((figures, step, seconds))


def following(*sinks: Sink) -> tuple[FakeHost, Follower]:
    host = FakeHost()
    return host, Follower(cast(HostClient, host), sinks)


def test_every_line_is_handed_on_once_and_half_a_line_waits() -> None:
    seen = Seen()
    host, follower = following(seen)
    follower.follow()
    host.log = STEP + EPOCH[:10]
    follower.follow()
    assert seen.got == [({"step/loss": 1.5, "step/images_per_second": 31.5}, 45, 10.0)]
    host.log = STEP + EPOCH
    follower.follow()
    follower.follow()
    assert seen.got[1:] == [
        ({"epoch/loss": 1.25, "held_out/loss": 1.0, "held_out/top1": 0.5, "held_out/top2": 0.75}, 2, 20.0)
    ]
    assert host.asked == [0, 0, len(STEP), len(STEP + EPOCH)]


def test_without_a_sink_the_host_is_not_asked() -> None:
    host, follower = following()
    host.log = STEP
    follower.follow()
    assert host.asked == []


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"time":"x","epoch":1}', b"\xff", b"[" * 100_000])
def test_a_line_that_is_none_is_refused_by_name(line: bytes) -> None:
    seen = Seen()
    host, follower = following(seen)
    host.log = line + b"\n"
    with refused(ProtocolError, "log.malformed"):
        follower.follow()
    assert seen.got == []


def test_json_lines_are_appended_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"earlier":1}\n')
    with open_sinks(jsonl=path) as sinks:
        host, follower = following(*sinks)
        host.log = STEP
        follower.follow()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"earlier": 1}, {"step": 45, "time": 10.0, "step/loss": 1.5, "step/images_per_second": 31.5}]


def test_tensorboard_gets_a_scalar_for_each_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_sinks(tensorboard=tmp_path) as sinks:
        host, follower = following(*sinks)
        host.log = STEP + EPOCH
        follower.follow()
    events = EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = events.Scalars("held_out/top1")
    assert (scalar.step, scalar.wall_time, scalar.value) == (2, 20.0, 0.5)
    assert [s.step for s in events.Scalars("step/loss")] == [45]


def test_mlflow_gets_all_figures_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Running:
        def __enter__(self) -> None:
            calls.append(("start", None))

        def __exit__(self, *_: object) -> None:
            calls.append(("end", None))

    fake = SimpleNamespace(
        set_tracking_uri=lambda address: calls.append(("uri", address)),
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=Running,
        log_metrics=lambda figures, step: calls.append(("log", (figures, step))),
    )
    monkeypatch.setitem(sys.modules, "mlflow", cast(ModuleType, fake))
    with open_sinks(mlflow="file:///runs") as sinks:
        host, follower = following(*sinks)
        host.log = STEP
        follower.follow()
    figures = {"step/loss": 1.5, "step/images_per_second": 31.5}
    begin = [("uri", "file:///runs"), ("experiment", "caltrain"), ("start", None)]
    assert calls == [*begin, ("log", (figures, 45)), ("end", None)]


def test_a_tool_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with refused(ConfigError, "tracking.not-installed") as error, open_sinks(mlflow="x"):
        pass
    assert "caltrain[mlflow]" in error.value.fix


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "tracking.cannot-open"), open_sinks(jsonl=tmp_path / "no" / "log"):
        pass
