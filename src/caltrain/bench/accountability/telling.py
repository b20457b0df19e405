"""The report for people: a table of methods for each case, and one of repairs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from caltrain.bench.accountability.figures import Figures
from caltrain.bench.accountability.grid import AccountabilityReport, CaseReport
from caltrain.bench.accountability.jobs import OURS
from caltrain.bench.accountability.planting import Case
from caltrain.bench.accountability.remedy import Repair

_COLUMNS = {
    "precision at 9": "precision_at_9",
    "poison precision": "poison_precision",
    "poison recall": "poison_recall",
    "contributor right": "contributor_accuracy",
    "falsely accused": "false_accusation_rate",
    "at most": "false_accusation_high",
    "cannot tell": "cannot_tell_rate",
    "labels AP": "mislabel_average_precision",
    "share error": "noise_rate_error",
    "verdicts": "verdicts",
}


def tables(report: AccountabilityReport) -> Iterator[Table]:
    """To be printed one after the other: one a case, without figures that have no meaning there."""
    for each in report.cases:
        yield _case(report.data, each)
    if report.remedy is not None:
        yield _repairs(report.remedy)


def _case(data: str, each: CaseReport) -> Table:
    attack = "" if each.attack_success is None else f", attack success {each.attack_success:.3f}"
    about = f"{data}, {Case(each.case, each.share)}: {each.runs} runs, accuracy {each.accuracy:.3f}{attack}"
    table = Table(title=about, title_justify="left", box=SIMPLE, padding=0)
    methods: dict[str, Figures] = {OURS: each, **each.peers}
    told = {
        title: name for title, name in _COLUMNS.items() if any(getattr(f, name) is not None for f in methods.values())
    }
    table.add_column("")
    for title in told:
        table.add_column(title, justify="right", width=10)
    for method, figures in methods.items():
        table.add_row(method, *(_cell(getattr(figures, name)) for name in told.values()))
    return table


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value}" if isinstance(value, int) else f"{value:.3f}"


def _repairs(found: dict[str, tuple[Repair, ...]]) -> Table:
    table = Table(title="Repair: attack success / accuracy, means over seeds", title_justify="left")
    for column in ("case", "seeds", "poisoned", "without the blamed", "never poisoned"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, repairs in found.items():
        states = [[getattr(r, which) for r in repairs] for which in ("poisoned", "repaired", "never_poisoned")]
        cells = [
            f"{sum(s.attack_success for s in some) / len(some):.3f} / {sum(s.accuracy for s in some) / len(some):.3f}"
            for some in states
        ]
        table.add_row(name, str(len(repairs)), *cells)
    return table
