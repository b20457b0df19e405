"""What is printed: JSON that a program can rely on, text that cannot steer a terminal, exit codes that stay."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console

from caltrain.cli.app import run
from caltrain.cli.output import Format, choose, emit, fail, say, say_simulated
from caltrain.errors import FAMILIES, CaltrainError
from caltrain.reports.terminal import plain, simulated_note

HOSTILE = "[bold]no[/bold] [/] \x1b]0;title\x07\x1b[2J[link=http://x]y\r\x08\u202e"


class Value(msgspec.Struct):
    name: str
    nothing: str | None = None
    flag: bool = True
    share: float = 2.2004690227
    some: tuple[str, ...] = ("a", "b")
    none: tuple[str, ...] = ()
    table: dict[str, str] = msgspec.field(default_factory=lambda: {"x": "on"})


def test_json_is_one_object_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    choose(Format.JSON)
    say("not this")
    say_simulated()
    emit(Value(HOSTILE), title="nor this")
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert json.loads(out)["name"] == HOSTILE
    assert "\x1b" not in out


def test_text_is_a_table_that_people_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Value("Ann"), title="Who")
    out, _ = capsys.readouterr()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "│" in line]
    assert out.startswith("Who")
    assert rows == [
        ["name", "Ann"],
        ["flag", "yes"],
        ["share", "2.20047"],
        ["some", "a, b"],
        ["none", "none"],
        ["table", "x on"],
    ]


def test_a_long_value_is_shown_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    emit({"digest": "sha256:" + "0123456789abcdef" * 8})
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 60
    joined = "".join(cell.strip() for line in out.splitlines() if "│" in line for cell in line.split("│")[2:3])
    assert joined == "sha256:" + "0123456789abcdef" * 8


@pytest.mark.parametrize("print_it", [say, lambda text: emit({"text": text}), lambda text: emit({text: 1})])
def test_text_from_outside_is_no_markup_and_no_control_sequence(
    print_it: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    print_it(HOSTILE)
    out, _ = capsys.readouterr()
    assert "[bold]no[/bold] [/]" in out
    assert "[link=http://x]y" in out
    assert not set("\x1b\x07\r\x08\u202e") & set(out)


def test_an_error_from_outside_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = CaltrainError("host.says", HOSTILE, step=HOSTILE, fix=HOSTILE)
    assert fail(error) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("[bold]no[/bold] [/]") == 3
    assert not set("\x1b\x07\r\x08\u202e") & set(err)


def test_plain_text_keeps_letters_of_all_languages_and_line_feeds() -> None:
    assert plain("Ünï 中文 ✓\nnext").plain == "Ünï 中文 ✓\nnext"
    assert plain("\x00\x1b\t\x85").plain == "\N{REPLACEMENT CHARACTER}" * 4


EXIT_CODES = {
    "ConfigError": 10,
    "DataError": 11,
    "IntegrityError": 12,
    "AttestationError": 13,
    "ProvisioningError": 14,
    "ProtocolError": 15,
    "AccessError": 16,
    "LineageError": 17,
    "EnvironmentFault": 18,
}


def test_every_family_has_its_exit_code() -> None:
    assert {name: family.exit_code for name, family in FAMILIES.items()} == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
@pytest.mark.parametrize("format_", Format)
def test_a_command_that_fails_prints_its_error_and_exits_with_its_familys_code(
    name: str, format_: Format, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = FAMILIES[name]("some.code", "what failed", step="where", fix="what to do")

    def raise_it() -> None:
        raise error

    monkeypatch.setattr("caltrain.doctor.examine", raise_it)
    assert run(["doctor", "--format", format_]) == EXIT_CODES[name]
    out, err = capsys.readouterr()
    if format_ is Format.JSON:
        assert json.loads(out) == {"error": error.diagnostics()}
        assert err == ""
    else:
        assert out == ""
        assert err == "error some.code: what failed\n  step: where\n  to do: what to do\n"


def test_what_the_machine_refuses_is_a_named_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("caltrain.doctor.examine", full)
    assert run(["doctor", "--format", "json"]) == 18
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "machine.refused"
    assert error["what"] == "No space left on device: /some/file"


def test_a_terminal_gets_colour_and_a_pipe_does_not() -> None:
    for is_terminal in (True, False):
        file = io.StringIO()
        Console(file=file, force_terminal=is_terminal, color_system="standard" if is_terminal else None).print(
            simulated_note()
        )
        assert ("\x1b[" in file.getvalue()) is is_terminal
        assert "simulated enclave" in file.getvalue()
