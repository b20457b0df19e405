"""The times of an assessment: every cut and measure has its seconds."""

from __future__ import annotations

import itertools

from caltrain.bench.exposure import run
from caltrain.exposure.asked import Asked
from caltrain.presets import PRESETS


def test_every_cut_and_measure_is_timed() -> None:
    ticks = itertools.count()
    told: list[str] = []
    asked = Asked(attacks=("kl", "labels"), maps=4, kl_inputs=40, cuts=(1, 3))
    report = run(
        "digits",
        asked=asked,
        targets=24,
        threads=1,
        clock=lambda: float(next(ticks)),
        on_step=lambda what, _done, _of: told.append(what),
    )
    assert [cut.front for cut in report.cuts] == [1, 3]
    assert all(set(cut.seconds) == {"kl", "labels"} for cut in report.cuts)
    assert all(value > 0 for cut in report.cuts for value in cut.seconds.values())
    assert [(cut.maps, cut.maps_shown) for cut in report.cuts] == [(16, 4), (64, 4)]
    assert report.kl_seconds == sum(cut.seconds["kl"] for cut in report.cuts) > 0
    assert (report.kl_inputs, report.validator) == (40, "digits")
    assert len(PRESETS["digits"].data.classes) == 10
    assert told
