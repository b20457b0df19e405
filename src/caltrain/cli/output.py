"""Text for people, JSON for programs: one value, two renderings."""

from __future__ import annotations

import sys
from collections.abc import Collection
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from caltrain.errors import CaltrainError
from caltrain.reports.terminal import plain, simulated_note

__all__ = ["Format", "FormatOption", "choose", "console", "emit", "fail", "say", "say_simulated", "wants_json"]


class Format(StrEnum):
    """How a command prints its result."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="text for people, json for programs")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def choose(format_: Format) -> None:
    """Remember the format, for errors as well as results. With JSON nothing else goes to standard output."""
    console.quiet = format_ is Format.JSON


def wants_json() -> bool:
    """Whether standard output must hold one JSON object and nothing else."""
    return console.quiet


def emit(value: Any, *, title: str = "", told: Collection[str] = ()) -> None:
    """Print a result: an object as JSON, or as a table of its fields but for those that people were `told` already."""
    if wants_json():
        sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
        sys.stdout.flush()
        return
    table = Table(title=title or None, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # digests and paths are to be copied: never cut short
    for key, field in msgspec.to_builtins(value).items():
        if field is not None and key not in told:
            table.add_row(plain(key), plain(_text(field)))
    console.print(table)


def say(text: str | RenderableType) -> None:
    """A line for people; silent when the output is JSON. A string is printed as it is, without markup."""
    console.print(plain(text) if isinstance(text, str) else text)


def say_simulated() -> None:
    """What every screen says that rests on a simulated enclave."""
    say(simulated_note())


def fail(error: CaltrainError) -> int:
    """Print an error and return its exit code."""
    if wants_json():
        emit({"error": error.diagnostics()})
    else:
        errors.print(Text("error", style="bold red"), plain(f"{error.code}: {error.what}"))
        errors.print(plain(f"  step: {error.step}\n  to do: {error.fix}"))
    return error.exit_code


def _text(field: object) -> str:
    match field:
        case bool():
            return "yes" if field else "no"
        case float():
            return f"{field:.6g}"
        case list() | tuple():
            return ", ".join(_text(entry) for entry in field) or "none"
        case dict():
            return ", ".join(f"{key} {_text(entry)}" for key, entry in field.items()) or "none"
        case _:
            return str(field)
