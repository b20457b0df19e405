"""The run's log: steps at most once a second, every epoch, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caltrain.boundary.messages import Measured
from caltrain.host.runlog import NAME, RunLog
from caltrain.host.store import Store


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def written(store: Store) -> list[dict[str, Any]]:
    path = store.path(NAME)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_steps_are_written_once_a_second_and_the_last_of_an_epoch_always(tmp_path: Path) -> None:
    store, clock = Store(tmp_path), Clock()
    log = RunLog(store, clock=clock)
    for step, now in ((1, 100.0), (2, 100.5), (3, 100.99), (4, 101.0), (5, 101.2), (6, 101.3)):
        clock.now = now
        log.step(epoch=1, step=step, steps=6, loss=0.5, images_per_second=10.04)
    assert [line["step"] for line in written(store)] == [1, 4, 6]
    first = {"time": 100.0, "epoch": 1, "step": 1, "steps": 6, "loss": 0.5, "images_per_second": 10.0}
    assert written(store)[0] == first


def test_an_epoch_has_its_held_out_figures_where_there_are_any(tmp_path: Path) -> None:
    store = Store(tmp_path)
    log = RunLog(store, clock=Clock())
    log.epoch(epoch=1, loss=0.25, held_out=None)
    log.epoch(epoch=2, loss=0.125, held_out=Measured(4, 0.5, 0.75, 1.0))
    held = {"records": 4, "loss": 0.5, "top1": 0.75, "top2": 1.0}
    assert written(store) == [
        {"time": 100.0, "epoch": 1, "loss": 0.25},
        {"time": 100.0, "epoch": 2, "loss": 0.125, "held_out": held},
    ]
