"""Text for people, JSON for programs: one value, two renderings."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from caltrain.errors import CaltrainError

SIMULATED = "[bold yellow]simulated enclave[/]: its operator can read everything; nothing here is confidential."


class Format(StrEnum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for programs")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
_chosen = Format.TEXT


def choose(format_: Format) -> None:
    """Remember the format, for errors as well as results."""
    global _chosen  # noqa: PLW0603  # one command runs in a process, and its errors are printed outside of it
    _chosen = format_


def wants_json() -> bool:
    """Whether standard output must hold one JSON object and nothing else."""
    return _chosen is Format.JSON


def emit(value: Any, *, title: str = "") -> None:
    """Print a result: an object as JSON, or as a table of its fields."""
    if wants_json():
        sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
        sys.stdout.flush()
        return
    fields = msgspec.to_builtins(value)
    table = Table(title=title or None, show_header=False, title_justify="left")
    for key, field in fields.items():
        table.add_row(str(key), str(field))
    console.print(table)


def say(text: str) -> None:
    """A line for people; silent when the output is JSON."""
    if not wants_json():
        console.print(text)


def fail(error: CaltrainError) -> int:
    """Print an error and return its exit code."""
    if wants_json():
        sys.stdout.buffer.write(msgspec.json.encode({"error": error.diagnostics()}) + b"\n")
    else:
        errors.print("[bold red]error[/]", f"{error.code}: {error.what}", style=None, markup=True)
        errors.print(f"  step: {error.step}\n  to do: {error.fix}", markup=False)
    return error.exit_code
