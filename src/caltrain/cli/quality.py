"""`caltrain party quality`: the contributors' shares of wrong labels over the runs that a party holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from caltrain.cli.output import Format, FormatOption, choose, emit, say, say_simulated, wants_json
from caltrain.exposure.figures import Estimate
from caltrain.participant.history import History, HuntedRun, history_of
from caltrain.participant.identity import load_identity
from caltrain.reports.terminal import in_words, plain

_WIDE = 16


def quality(
    home: Annotated[Path, typer.Option(help="the party's folder")],
    runs: Annotated[
        list[Path] | None, typer.Argument(help="folders of runs (runs/ID); without any, all that the party holds")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="the same as one HTML page, for people")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Show how the contributors' shares of wrong labels changed from run to run, as far as this party was told them."""
    choose(format_)
    history = history_of(load_identity(home), runs or ())
    if report is not None:
        from caltrain.reports.quality import write_quality  # noqa: PLC0415  # jinja2, only for a page

        write_quality(report, history)
    if any(run.linked.simulated for run in history.runs):
        say_simulated()
    if any(run.wrong_labels for run in history.runs):
        say(_table(history))
        say("Estimates with 95 % intervals: a change within overlapping intervals is no change.")
    else:
        say("No run with a hunt: there is nothing to show yet.")
    if history.without:
        say(f"Without a report of a hunt, and so not shown: {', '.join(history.without)}")
    if report is not None:
        say(f"report: {report}")
    if wants_json():
        runs_told = [_fields(run) for run in history.runs]
        emit({"party": history.party, "runs": runs_told, "without_report": history.without, "report": report})


def _fields(run: HuntedRun) -> dict[str, object]:
    return {
        "run": run.linked.run,
        "model": run.linked.model,
        "changed": run.changed,
        "left_out": run.linked.repair.records if run.linked.repair else 0,
        "audit_rate": run.linked.audit_rate,
        "resumes": run.linked.resumes,
        "simulated": run.linked.simulated,
        "wrong_labels": run.wrong_labels,
    }


def _table(history: History) -> Table:
    """By contributor its runs in order, each with its interval on a scale that all share."""
    told = [share for run in history.runs for share in run.wrong_labels.values()]
    top = max(share.high for share in told) or 1.0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("contributor", "run", "wrong labels", f"0 to {top:.0%}", "changed"):
        table.add_column(heading, overflow="fold", no_wrap=heading not in {"contributor", "changed"})
    for name in history.contributors:
        rows = [(number, run) for number, run in enumerate(history.runs, 1) if name in run.wrong_labels]
        for row, (number, run) in enumerate(rows):
            share = run.wrong_labels[name]
            table.add_row(
                plain("" if row else name),
                f"{number} {run.linked.run[:8]}",
                in_words(share),
                _bar(share, top),
                ", ".join(run.changed),
                end_section=row == len(rows) - 1,
            )
    return table


def _bar(share: Estimate, top: float) -> str:
    """An interval in characters: dots to the end of the scale, a line from end to end, a mark at the estimate."""
    low, value, high = (round(each / top * (_WIDE - 1)) for each in (share.low, share.value, share.high))
    drawn = ["─" if low <= at <= high else "·" for at in range(_WIDE)]
    drawn[low], drawn[high] = "├", "┤"
    drawn[value] = "●"
    return "".join(drawn)
