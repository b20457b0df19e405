"""The exposure report on a terminal."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from caltrain.exposure.choice import Choice, Miss
from caltrain.exposure.report import ExposureReport
from caltrain.reports.exposure_text import findings, print_exposure
from support.exposure_report import cut_report, exposure_report, labelled, scored

MISS = Miss(key="whitebox.ssim", limit=0.3, reached=0.52, mean=0.5, n=16, by_mean=True)
UNSURE = Miss(key="kl_ratio", limit=1.0, reached=0.9, mean=1.1, n=16, by_mean=False)


def printed(report: ExposureReport, *, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=160, force_terminal=colour, color_system="standard" if colour else None)
    print_exposure(report, console)
    return file.getvalue()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def test_a_row_for_every_cut_and_every_guess() -> None:
    assert rows(printed(exposure_report())) == [
        ["1", "conv 8 3x3", "50.0%", "4,096", "0.30", "0.90", "1.00", "0.70", "0.00"],
        ["3", "conv 8 3x3", "50.0%", "4,096", "1.40", "0.50", "0.60", "0.10", "0.00"],
        ["", "floor: mean image", "", "", "", "0.20", "0.00", "0.20", "0.00"],
        ["", "floor: own draw", "", "", "", "0.10", "0.00", "0.10", "0.00"],
    ]


def test_labels_are_told_by_irs_and_by_gradients() -> None:
    report = labelled(exposure_report())
    assert [row[-2:] for row in rows(printed(report))[:2]] == [["0.31", "0.86"]] * 2
    assert (
        "ternary training: gradients that leave the HeadNet fall into label groups with purity 0.98 (floor 0.10): "
        "49% named by 1 known of each class"
    ) in list(findings(report))


def test_compute_that_a_stage_hides_is_not_guessed() -> None:
    assert rows(printed(exposure_report({2: cut_report(2, {"shadow": scored()}, compute=None)})))[0][2] == "?"


def test_what_a_guess_reaches_is_dim_and_the_chosen_cut_bold() -> None:
    choice = Choice(front=3, nearest=None, misses={})
    text = printed(msgspec.structs.replace(exposure_report(), choice=choice), colour=True)
    shallow, deep = (line for line in text.splitlines() if "conv 8" in line)
    assert "\x1b[2m 0.00" in shallow
    assert "\x1b[2m 0.70" not in shallow
    assert "\x1b[1m" in deep
    assert "\x1b[1m" not in shallow


def test_findings_name_the_papers_cut_and_what_breaks_it() -> None:
    assert list(findings(exposure_report())) == [
        "the papers' rule (judge: a validator right on 88.0%) calls safe: cut 3",
        "cut 3 passes the papers' rule, but pictures come back there by whitebox",
    ]


def test_a_policy_that_no_cut_meets_says_which_is_nearest_by_how_much_and_what_may_help() -> None:
    choice = Choice(front=None, nearest=3, misses={1: (MISS,), 3: (MISS, UNSURE)}, advice=("a deeper model",))
    found = list(findings(msgspec.structs.replace(exposure_report(), choice=choice, assumptions=("assumes much",))))
    assert found[2:] == [
        "no cut meets the policy; nearest is 3",
        "cut 3 misses whitebox.ssim 0.3 by 0.22 (its mean), kl_ratio 1 by 0.1 (the end of its interval, not its mean)",
        "may help: a deeper model",
        "assumes much",
    ]


@pytest.mark.parametrize("front", [1, 3])
def test_a_choice_is_named(front: int) -> None:
    report = msgspec.structs.replace(exposure_report(), choice=Choice(front=front, nearest=None, misses={}))
    assert f"cut by the policy: {front}" in list(findings(report))


def test_the_name_of_the_data_cannot_steer_the_terminal() -> None:
    text = printed(exposure_report(data="[bold]no[/bold] \x1b[2J"))
    assert "[bold]no[/bold]" in text
    assert "\x1b" not in text
