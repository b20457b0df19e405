"""What the terminal shows: exactly this, and nothing that came from outside as a command to it."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.console import Console

from caltrain.doctor import Attempt, DoctorReport, Finding, Measure, SandboxTrial
from caltrain.reports.terminal import print_doctor, print_result, step_line
from support.results import RESULT

HOSTILE = "[red]x[/red] \x1b[2J\x07"

RESULT_SCREEN = """\
CalTrain demo on digits (ternary, simulated enclave)
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓
┃                                       ┃      protected ┃ plain PyTorch ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩
│ accuracy                              │         0.9800 │        0.9800 │
│ attack success                        │         0.9975 │        0.9975 │
│ weights identical, bit for bit        │            yes │               │
├───────────────────────────────────────┼────────────────┼───────────────┤
│ records, of which planted             │   1,347, 1.93% │               │
│ triggered inputs traced               │            399 │               │
│ planted among the nine nearest        │         0.9987 │               │
│ traces that name dogwood, the culprit │         1.0000 │               │
│ mislabelled records found (AUROC)     │         0.9996 │               │
├───────────────────────────────────────┼────────────────┼───────────────┤
│ the verdict holds responsible         │        dogwood │               │
│ its records: precision, recall        │ 0.9615, 1.0000 │               │
├───────────────────────────────────────┼────────────────┼───────────────┤
│ disclosures verified                  │       27 of 27 │               │
│ substitutes refused                   │       27 of 27 │               │
│ events in the chain                   │            115 │               │
│ seconds                               │           42.0 │               │
└───────────────────────────────────────┴────────────────┴───────────────┘
simulated enclave: its operator can read everything; nothing is confidential.
center not audited: a hostile host could have planted what no record shows.
report: /somewhere/digits-1/report.html
"""


def shown(width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, color_system=None, highlight=False), file


def test_the_result_is_one_table() -> None:
    console, file = shown()
    print_result(RESULT, console)
    assert "\n".join(line.rstrip() for line in file.getvalue().split("\n")) == RESULT_SCREEN


def test_a_verdict_that_names_nobody_is_said_to_be_that() -> None:
    console, file = shown()
    result = msgspec.structs.replace(
        RESULT, verdict_contributors=(), verdict_records=0, verdict_precision=None, verdict_recall=0.0
    )
    print_result(result, console)
    assert re.search("the verdict holds responsible +│ +cannot tell", file.getvalue())
    assert re.search("its records: precision, recall +│ +none, 0.0000", file.getvalue())


def test_weights_that_differ_are_not_overlooked() -> None:
    console, file = shown()
    print_result(msgspec.structs.replace(RESULT, weights_identical=False), console)
    line = next(line for line in file.getvalue().splitlines() if "weights identical" in line)
    assert "NO" in line
    assert "yes" not in line


def test_a_path_is_no_markup_and_is_not_broken() -> None:
    console, file = shown()
    path = "/somewhere/[bold]x[/bold]/" + "y" * 100
    print_result(msgspec.structs.replace(RESULT, report=path + "\x1b[2J"), console)
    assert f"report: {path}\N{REPLACEMENT CHARACTER}[2J\n" in file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_step_is_indented_where_it_wraps(width: int) -> None:
    console, file = shown(width)
    console.print(step_line(7, "release", "word " * 40))
    first, *more = file.getvalue().splitlines()
    assert first.startswith(" 7 release   word word")
    assert more
    assert all(line.startswith(" " * 13 + "word") for line in more)
    assert all(len(line) <= width for line in (first, *more))


def test_a_step_is_no_markup() -> None:
    console, file = shown()
    console.print(step_line(7, "x", HOSTILE))
    assert "[red]x[/red]" in file.getvalue()
    assert "\x1b" not in file.getvalue()


REPORT = DoctorReport(
    software=(Finding("python", "yes", "CPython 3.11"),),
    isolation=(Finding("seccomp", "no", HOSTILE), Finding("ptrace", "unknown", "cannot tell " * 10)),
    hardware=(Finding("sgx", "no", "/dev/sgx_enclave is not there"),),
    trials=(
        SandboxTrial(
            "bare",
            "1 of 2 refused",
            (Measure("no-core-dump", "on", "limit 0"), Measure("landlock", "off", "old kernel")),
            (Attempt("connect", refused=True, detail="EPERM"), Attempt("bind", refused=False, detail="got through")),
        ),
        SandboxTrial("bubblewrap", "1 of 1 refused", (), (Attempt("connect", refused=True, detail="ENETUNREACH"),)),
    ),
    not_protected=("root reads all " * 8, "rollback"),
)


@pytest.mark.parametrize("width", [80, 120])
def test_the_doctor_shows_every_finding_in_columns(width: int) -> None:
    console, file = shown(width)
    print_doctor(REPORT, measurement="sha384:" + "0" * 96, console=console)
    text = file.getvalue()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "Enclave program",
        "sha384:" + "0" * 96,
        "python yes CPython 3.11",
        "sgx no /dev/sgx_enclave is not there",
        "bare 1 of 2 refused",
        "bubblewrap 1 of 1 refused",
        "bare bubblewrap",
        "no-core-dump on limit 0",
        "landlock off old kernel",
        "connect refused refused EPERM / ENETUNREACH",
        "bind POSSIBLE got through",
        "Not protected in a simulated enclave",
        "- rollback",
    ):
        assert line in lines
    assert any(line.startswith("ptrace ? cannot tell") for line in lines)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines() if "sha384" not in line)


def test_a_trial_that_did_not_run_is_said() -> None:
    console, file = shown()
    report = msgspec.structs.replace(REPORT, trials=(SandboxTrial("bare", "the trial did not run: no memory"),))
    print_doctor(report, measurement="x", console=console)
    assert "bare  the trial did not run: no memory" in file.getvalue()
