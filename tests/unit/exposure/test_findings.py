"""What follows from figures: where leakage ends, and where the papers' test and the attacks disagree."""

from __future__ import annotations

import pytest

from caltrain.exposure.figures import Scores
from caltrain.exposure.findings import at_floor, attacks_of, beats, broken, depth_correlations, floor_at
from support.exposure_report import FLOORS, about, cut_report, scored

CLOSE = scored(0.8, reidentification=0.9, psnr=20.0, perceptual=0.1)


@pytest.mark.parametrize(
    ("measure", "value", "guess"),
    [
        ("ssim", 0.23, True),  # its interval reaches that of the mean image, the better guess
        ("ssim", 0.25, False),
        ("psnr", 9.03, True),
        ("psnr", 9.05, False),
        ("perceptual", 0.57, True),  # smaller is closer: the better guess is the draw
        ("perceptual", 0.55, False),
        ("reidentification", 0.03, True),
        ("reidentification", 0.05, False),
    ],
)
def test_a_figure_is_at_its_floor_where_its_interval_reaches_the_better_guess(
    measure: str, value: float, *, guess: bool
) -> None:
    assert at_floor(measure, about(value), FLOORS) is guess


def test_an_attack_beats_the_floors_by_some_measures() -> None:
    assert beats(CLOSE, FLOORS) == ("psnr", "ssim", "perceptual", "reidentification")
    assert beats(scored(0.5), FLOORS) == ("ssim",)
    assert beats(FLOORS["own draw"], FLOORS) == ()


def test_leakage_ends_at_the_first_cut_from_which_on_all_are_at_the_floor() -> None:
    cuts = {
        front: cut_report(front, {"whitebox": scored(ssim, perceptual=0.1)})
        for front, ssim in ((1, 0.9), (2, 0.1), (3, 0.5), (5, 0.1), (8, 0.1))
    }
    found = floor_at(cuts, FLOORS)
    assert found["whitebox.ssim"] == 5
    assert found["whitebox.psnr"] == 1
    assert found["whitebox.perceptual"] is None
    assert set(found) == {f"whitebox.{name}" for name in ("psnr", "ssim", "perceptual", "reidentification")}


def test_an_attack_that_is_missing_at_a_cut_is_not_compared_over_cuts() -> None:
    cuts = {1: cut_report(1, {"shadow": scored(), "whitebox": scored()}), 2: cut_report(2, {"whitebox": scored()})}
    assert attacks_of(cuts) == ["whitebox"]
    assert {key.partition(".")[0] for key in floor_at(cuts, FLOORS)} == {"whitebox"}


def test_figures_are_correlated_with_depth_from_three_cuts_on() -> None:
    falling = {front: cut_report(front, {"inverter": scored(1 / front)}, ratio=front) for front in (1, 4, 9)}
    found = depth_correlations(falling)
    assert found["inverter.ssim"] == pytest.approx(-1)
    assert found["kl_ratio"] == pytest.approx(1)
    assert found["channel_correlation"] == 0
    assert depth_correlations({front: falling[front] for front in (1, 4)}) == {}


def test_figures_that_a_cut_lacks_have_no_correlation() -> None:
    cuts = {front: cut_report(front, ratio=1.0 if front < 3 else None) for front in (1, 2, 3)}
    assert set(depth_correlations(cuts)) == {"channel_correlation", "distance_correlation"}


@pytest.mark.parametrize(
    ("ratio", "scores", "names"),
    [
        (1.2, CLOSE, ("whitebox",)),
        (1.0, scored(0.5), ("whitebox",)),
        (1.0, scored(reidentification=0.5), ("whitebox",)),
        (0.99, CLOSE, ()),  # the papers' rule does not call it safe
        (None, CLOSE, ()),
        (1.2, scored(), ()),
        (1.2, scored(psnr=20.0, perceptual=0.1), ()),  # neither recognisable nor found
    ],
)
def test_a_cut_is_broken_where_the_papers_call_it_safe_and_an_attack_gets_pictures_back(
    ratio: float | None, scores: Scores, names: tuple[str, ...]
) -> None:
    cuts = {4: cut_report(4, {"whitebox": scores, "shadow": scored()}, ratio=ratio)}
    assert broken(cuts, FLOORS, tolerance=1.0) == ({4: names} if names else {})


def test_the_tolerance_says_what_the_papers_call_safe() -> None:
    cuts = {4: cut_report(4, {"whitebox": CLOSE}, ratio=0.6)}
    assert broken(cuts, FLOORS, tolerance=0.5) == {4: ("whitebox",)}
