"""A run as it goes on: what the bar says, and when watching ends."""

from __future__ import annotations

import io
import re
from typing import cast

import pytest
from rich.console import Console

from caltrain.errors import DataError, EnvironmentFault
from caltrain.host_client import HostClient, RunStatus
from caltrain.reports import progress
from caltrain.reports.progress import line, training_figures, waiting, watch

TRAIN = RunStatus("train", epoch=3, epochs=8, done=21, total=42, loss=0.51234, images_per_second=1234.5)


class FakeHost:
    def __init__(self, *statuses: RunStatus) -> None:
        self.statuses = list(statuses)

    def status(self) -> RunStatus:
        return self.statuses.pop(0)


def host(*statuses: RunStatus) -> HostClient:
    return cast(HostClient, FakeHost(*statuses))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_POLL", 0.11)  # the bar is drawn ten times a second


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=25, force_terminal=True, force_interactive=True, color_system=None
    )


def screen(console: Console) -> list[str]:
    """All lines that were drawn, without control sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", cast(io.StringIO, console.file).getvalue()))


def test_in_training_it_says_epoch_loss_and_speed() -> None:
    assert line(TRAIN) == {
        "description": "epoch 3/8",
        "total": 8,
        "completed": 2.5,
        "figures": "loss 0.5123, 1,234 images/s",
    }


@pytest.mark.parametrize(
    ("loss", "speed", "text"),
    [
        (None, None, ""),
        (1.0, None, "loss 1.0000"),
        (None, 10.0, "10 images/s"),
        (0.0, 10.0, "loss 0.0000, 10 images/s"),
    ],
)
def test_only_what_is_known_is_said(loss: float | None, speed: float | None, text: str) -> None:
    assert training_figures(RunStatus("train", loss=loss, images_per_second=speed)) == text


def test_elsewhere_it_says_the_phase_and_who_is_waited_for() -> None:
    assert line(RunStatus("ingest", done=5, total=10)) == {
        "description": "ingest",
        "total": 10,
        "completed": 5,
        "figures": "",
    }
    waiting = line(RunStatus("approvals", waiting_for=["ann", "bob"]))
    assert (waiting["total"], waiting["figures"]) == (None, "waiting for ann, bob")


def test_the_hosts_words_are_bounded_and_steer_nothing() -> None:
    said = line(RunStatus("\x1b[2J[red]" + "x" * 1000, waiting_for=["\x07" * 1000]))
    for text in (said["description"], said["figures"]):
        assert len(text) <= 60
        assert not set("\x1b\x07") & set(text)


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_fits_the_screen_and_shows_all(width: int) -> None:
    console = terminal(width)
    last = watch(host(TRAIN, TRAIN, RunStatus("linked", loss=0.5)), seconds=60, console=console)
    assert last.loss == 0.5
    drawn = [text for text in screen(console) if "epoch" in text]
    assert drawn
    for text in drawn:
        assert len(text) <= width
        assert re.search(r"epoch 3/8 .*━.* loss 0\.5123, 1,234 images/s +\S+ left", text)


def test_hostile_words_reach_the_bar_as_text() -> None:
    console = terminal(80)
    watch(host(RunStatus("[/] [red]x"), RunStatus("[/] [red]x"), RunStatus("linked")), seconds=60, console=console)
    assert any("[/] [red]x" in text for text in screen(console))


@pytest.mark.parametrize("console", [Console(file=io.StringIO()), Console(file=io.StringIO(), quiet=True)])
def test_there_is_no_bar_where_nobody_watches(console: Console) -> None:
    watch(host(TRAIN, RunStatus("linked")), seconds=60, console=console)
    assert cast(io.StringIO, console.file).getvalue() == ""


def test_the_runs_error_is_raised() -> None:
    error = DataError("record.shape", "bad", step="ingest", fix="seal again")
    with pytest.raises(DataError, match=r"^record\.shape: bad"):
        watch(host(TRAIN, RunStatus("failed", error=error.diagnostics())), seconds=60, console=terminal(80))


def test_it_does_not_wait_longer_than_asked() -> None:
    with pytest.raises(EnvironmentFault, match=r"^host\.too-slow: .*'train'"):
        watch(host(TRAIN), seconds=-1, console=terminal(80))


def test_what_nobody_can_foretell_is_seen_to_go_on_by_people_alone() -> None:
    shown, quiet = terminal(60), terminal(60)
    quiet.quiet = True
    for console in (shown, quiet):
        with waiting(console, "the enclave looks [at] all records"):
            pass
    assert any("the enclave looks [at] all records 0:00:0" in line for line in screen(shown))
    assert "enclave" not in "".join(screen(quiet))
