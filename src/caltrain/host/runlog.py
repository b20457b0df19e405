"""The run as JSON lines, for people's tools: what the host says of it, so nothing here is evidence (the chain is).

{"time": 1760000000.0, "epoch": 1, "step": 120, "steps": 390, "loss": 1.91, "images_per_second": 31.0}
{"time": 1760000400.0, "epoch": 1, "loss": 1.52, "held_out": {"records": 500, "loss": 1.4, "top1": 0.5, ...}}
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from caltrain.boundary.messages import Measured
from caltrain.host.store import Store

NAME = "log.jsonl"
_EVERY = 1.0


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line: of a step, or (with no `step`) of an epoch that is over. `time` is the host's clock (Unix seconds)."""

    time: float
    epoch: int
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    held_out: Measured | None = None


class RunLog:
    """Writes steps at most once a second, and every epoch."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._last = 0.0

    def step(self, *, epoch: int, step: int, steps: int, loss: float | None, images_per_second: float) -> None:
        """A step is over."""
        now = self._clock()
        if now - self._last < _EVERY and step < steps:
            return
        self._last = now
        speed = round(images_per_second, 1)
        self._write(Line(time=now, epoch=epoch, step=step, steps=steps, loss=loss, images_per_second=speed))

    def epoch(self, *, epoch: int, loss: float | None, held_out: Measured | None) -> None:
        """An epoch is over."""
        self._write(Line(time=self._clock(), epoch=epoch, loss=loss, held_out=held_out))

    def _write(self, line: Line) -> None:
        self._store.append_line(NAME, msgspec.json.encode(line))
