"""Shares with their intervals, one below the other, on one scale: numbers for an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from caltrain.exposure.figures import Estimate

WIDTH = 240
_STEP = 0.05


class Bar(NamedTuple):
    """From `low` to `high` with a mark at `value`, and where the truth lies, in 0..WIDTH."""

    low: float
    value: float
    high: float
    truth: float


class Bars(NamedTuple):
    """All bars, and the share at the right end of their scale."""

    rows: tuple[Bar, ...]
    top: float


def bars(shares: Sequence[tuple[Estimate, float]]) -> Bars:
    """Each an estimate and the true share, 0 to 1."""
    most = max((max(found.high, truth) for found, truth in shares), default=0.0)
    top = min(1.0, max(_STEP, math.ceil(round(most / _STEP, 6)) * _STEP))
    rows = (Bar(*(round(x / top * WIDTH, 1) for x in (e.low, e.value, e.high, truth))) for e, truth in shares)
    return Bars(tuple(rows), round(top, 2))
