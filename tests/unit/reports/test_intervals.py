"""Intervals on one scale."""

from __future__ import annotations

import pytest

from caltrain.exposure.figures import Estimate
from caltrain.reports.intervals import WIDTH, Bar, bars


def test_all_have_one_scale_that_ends_at_the_next_twentieth() -> None:
    found = bars([(Estimate(0.1, 0.05, 0.17, 9), 0.12), (Estimate(0.0, 0.0, 0.04, 9), 0.0)])
    assert found.top == 0.2
    assert found.rows == (Bar(60.0, 120.0, 204.0, 144.0), Bar(0.0, 0.0, 48.0, 0.0))


@pytest.mark.parametrize(
    ("high", "truth", "top"), [(0.0, 0.0, 0.05), (0.15, 0.0, 0.15), (0.1, 0.31, 0.35), (1.0, 0.2, 1.0)]
)
def test_the_scale_holds_interval_and_truth(high: float, truth: float, top: float) -> None:
    found = bars([(Estimate(0.0, 0.0, high, 9), truth)])
    assert found.top == top
    assert all(0 <= value <= WIDTH for value in found.rows[0])


def test_nobody_has_no_bar() -> None:
    assert bars([]).rows == ()
