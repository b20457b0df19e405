"""What the terminal shows: the demo's steps and its result, a run's progress, what the doctor found.

Every text comes from outside: a host, a file, a path. None is read as markup, and none can steer the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from caltrain.demo.result import DemoResult
from caltrain.doctor import DoctorReport, Finding, SandboxTrial
from caltrain.exposure.figures import Estimate

_MARKS = {"yes": ("yes", "green"), "no": ("no", "yellow"), "unknown": ("?", "dim")}


def plain(text: str) -> Text:
    """Text as it is: no markup, and no control characters but the line feed."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def simulated_note() -> Text:
    """What every screen says that rests on a simulated enclave."""
    return Text.assemble(
        ("simulated enclave", "bold yellow"), ": its operator can read everything; nothing is confidential."
    )


def center_note(audit_rate: float, resumes: int = 0) -> str:
    """What every screen says of the part outside, that can rest on it."""
    if audit_rate:
        note = f"center audited at rate {audit_rate:g}: so many of its steps were repeated inside, bit for bit."
        restarts = f" The run was taken up again {resumes} times: a host could have hidden a finding that way."
        return note + (restarts if resumes else "")
    return "center not audited: a hostile host could have planted what no record shows."


def in_words(share: Estimate) -> str:
    """A share with its 95 % interval."""
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def step_line(number: int, name: str, text: str) -> Table:
    """One step of the demo; a long text is indented where it wraps."""
    line = Table.grid(padding=(0, 1))
    line.add_column(justify="right", width=2, style="dim")
    line.add_column(width=9, style="bold")
    line.add_column(overflow="fold")
    line.add_row(str(number), name, plain(text))
    return line


def print_result(result: DemoResult, console: Console) -> None:
    """One table: what was measured, with the protected and the plain figure side by side where there are two."""
    table = Table(title=f"CalTrain demo on {result.data} ({result.form}, simulated enclave)", title_justify="left")
    for heading in ("", "protected", "plain PyTorch"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("accuracy", f"{result.accuracy:.4f}", f"{result.plain_accuracy:.4f}")
    table.add_row("attack success", f"{result.attack_success:.4f}", f"{result.plain_attack_success:.4f}")
    table.add_row("weights identical, bit for bit", "yes" if result.weights_identical else "[bold red]NO[/]", "")
    table.add_section()
    table.add_row("records, of which planted", f"{result.records:,}, {result.poison_share:.2%}", "")
    table.add_row("triggered inputs traced", str(result.triggered_inputs), "")
    table.add_row("planted among the nine nearest", f"{result.trace_precision_at_9:.4f}", "")
    table.add_row(f"traces that name {result.culprit}, the culprit", f"{result.trace_contributor_accuracy:.4f}", "")
    table.add_row("mislabelled records found (AUROC)", f"{result.mislabel_auroc:.4f}", "")
    table.add_section()
    table.add_row("the verdict holds responsible", plain(", ".join(result.verdict_contributors) or "cannot tell"), "")
    table.add_row("its records: precision, recall", _named(result), "")
    table.add_section()
    table.add_row("disclosures verified", f"{result.disclosures_verified} of {result.disclosures}", "")
    table.add_row("substitutes refused", f"{result.substitutions_refused} of {result.substitutions}", "")
    table.add_row("events in the chain", str(result.events), "")
    table.add_row("seconds", f"{result.seconds:.1f}", "")
    console.print(table)
    console.print(simulated_note())
    console.print(center_note(result.audit_rate))
    console.print(Text.assemble("report: ", plain(_near(result.report))), soft_wrap=True)


def _named(result: DemoResult) -> str:
    """How right the records are that a verdict names."""
    precision = "none" if result.verdict_precision is None else f"{result.verdict_precision:.4f}"
    return f"{precision}, {result.verdict_recall:.4f}"


def _near(path: str) -> str:
    """A path as the reader would type it: relative where it lies below the present folder."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def print_doctor(report: DoctorReport, *, measurement: str, console: Console) -> None:
    """What holds on this machine, area by area, and what no simulated enclave gives."""
    console.print(Text.assemble(("Enclave program", "bold"), "\n  ", measurement), soft_wrap=True)
    _print_table("Software", (_finding(f) for f in report.software), console)
    _print_table("Isolation", (_finding(f) for f in report.isolation), console)
    _print_table("TEE hardware", (_finding(f) for f in report.hardware), console)
    _print_trials(report.trials, console)
    console.print(Text("\nNot protected in a simulated enclave", style="bold yellow"))
    _print_rows(((Text("-"), plain(line)) for line in report.not_protected), console)


def _finding(finding: Finding) -> tuple[RenderableType, ...]:
    return plain(finding.name), Text(*_MARKS[finding.state]), plain(finding.detail)


def _print_trials(trials: Iterable[SandboxTrial], console: Console) -> None:
    """Side by side: a program that locks itself as the enclave does, bare and in bubblewrap, then tries to get out."""
    trials = tuple(trials)
    measures = [{m.name: (_state(m.state), m.detail) for m in trial.measures} for trial in trials]
    attempts = [{a.name: (_refusal(refused=a.refused), a.detail) for a in trial.attempts} for trial in trials]
    _print_table("Sandbox trials", ((plain(trial.started), plain(trial.detail)) for trial in trials), console)
    rows = [*_side_by_side(measures), *_side_by_side(attempts)]
    _print_rows(rows, console, headings=["", *(trial.started for trial in trials), ""])


def _side_by_side(found: Sequence[dict[str, tuple[Text, str]]]) -> Iterator[tuple[RenderableType, ...]]:
    """A row for each name: its mark in each trial, and what was said of it, once where all say the same."""
    for name in dict.fromkeys(name for trial in found for name in trial):
        marks = (trial[name][0] if name in trial else Text() for trial in found)
        details = dict.fromkeys(trial[name][1] for trial in found if name in trial)
        yield plain(name), *marks, plain(" / ".join(details))


def _state(state: str) -> Text:
    return Text(state, style="green" if state == "on" else "yellow")


def _refusal(*, refused: bool) -> Text:
    return Text("refused", style="green") if refused else Text("POSSIBLE", style="bold red")


def _print_table(title: str, rows: Iterable[tuple[RenderableType, ...]], console: Console) -> None:
    console.print(Text.assemble("\n", (title, "bold")))
    _print_rows(rows, console)


def _print_rows(rows: Iterable[tuple[RenderableType, ...]], console: Console, *, headings: Sequence[str] = ()) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(headings))
    for heading in ("", *headings) if headings else ():
        table.add_column(heading)
    for row in rows:
        table.add_row(Text(""), *row)
    console.print(table)
