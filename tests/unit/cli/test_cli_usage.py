"""Help for every command, and command lines that cannot be read."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import typer

from caltrain import __version__
from caltrain.cli.app import app
from caltrain.presets import PRESETS, PresetName
from support.commands import Cli

COMMANDS = {
    ("demo",),
    ("doctor",),
    ("new",),
    ("plan", "check"),
    ("plan", "digest"),
    ("plan", "approve"),
    ("party", "keygen"),
    ("party", "seal"),
    ("party", "join"),
    ("party", "disclose"),
    ("party", "reader"),
    ("host", "serve"),
    ("train", "run"),
    ("train", "resume"),
    ("train", "move-cut"),
    ("party", "rejoin"),
    ("party", "agree-cut"),
    ("party", "assess"),
    ("party", "hunt"),
    ("party", "quality"),
    ("bench", "exposure"),
    ("bench", "infer"),
    ("bench", "trace"),
    ("bench", "accountability"),
    ("exposure", "assess"),
    ("exposure", "verify"),
    ("model", "package"),
    ("model", "show"),
    ("model", "grant"),
    ("model", "credential"),
    ("serve",),
    ("proxy",),
    ("predict",),
    ("trace",),
    ("verdict",),
    ("verify",),
    ("remedy", "plan"),
    ("remedy", "compare"),
    ("bench", "sealing"),
    ("bench", "train"),
    ("version",),
}
GROUPS = {words[:1] for words in COMMANDS if len(words) > 1} | {()}


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command below `command`."""
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from walk(inner, (*words, name))
        else:
            yield (*words, name)


def test_these_are_all_commands() -> None:
    assert set(walk(typer.main.get_command(app))) == COMMANDS


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_every_command_explains_itself_and_takes_a_format(words: tuple[str, ...], cli: Cli) -> None:
    shown = cli(*words, "--help")
    assert shown.code == 0
    assert shown.err == ""
    assert f"Usage: caltrain {' '.join(words)}" in shown.out
    assert re.search(r"--format +<text\|json>", shown.out)


@pytest.mark.parametrize("words", sorted(GROUPS))
def test_every_group_lists_its_commands(words: tuple[str, ...], cli: Cli) -> None:
    shown = cli(*words, "--help")
    assert shown.code == 0
    below = {inner[len(words)] for inner in COMMANDS if inner[: len(words)] == words}
    assert below <= set(re.findall(r"^│ (\S+)", shown.out, re.MULTILINE))


def test_the_help_names_the_exit_codes_and_fits_eighty_columns(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("--help").out
    assert all(len(line) <= 80 for line in out.splitlines())
    numbers = set(re.findall(r"\b\d+\b", out[out.index("Exit codes") :]))
    assert numbers == {"0", "2", *(str(code) for code in range(10, 19)), "130"}
    # One line for each command: the short help is short enough.
    listed = [line for line in out.splitlines() if line.startswith("│ ") and "--help" not in line]
    assert len(listed) == len({words[0] for words in COMMANDS})


@pytest.mark.parametrize("words", sorted(GROUPS))
def test_a_group_alone_shows_its_help_as_wrong_usage(words: tuple[str, ...], cli: Cli) -> None:
    shown = cli(*words)
    assert shown.code == 2
    assert "Usage: caltrain" in shown.out
    assert shown.err == ""


WRONG = [
    (("nonsense",), "No such command 'nonsense'."),
    (("plan", "nonsense"), "No such command 'nonsense'."),
    (("plan", "check"), "Missing argument 'path'."),
    (("plan", "check", "a", "b"), "unexpected extra argument"),
    (("plan", "check", "a", "--nonsense"), "No such option: --nonsense"),
    (("party", "keygen", "ann"), "Missing option '--home'."),
    (("demo", "--data", "nonsense"), "'nonsense' is not one of"),
    (("demo", "--form", "nonsense"), "'nonsense' is not one of"),
    (("demo", "--epochs", "0"), "--epochs"),
    (("new", "x", "--data", "nonsense"), "'nonsense' is not one of"),
    (("host", "serve", "--port", "65536"), "--port"),
    (("predict", "x", "--model"), "--model"),
]


@pytest.mark.parametrize(("words", "what"), WRONG)
def test_wrong_usage_is_exit_code_2_and_says_what_is_wrong(words: tuple[str, ...], what: str, cli: Cli) -> None:
    shown = cli(*words)
    assert shown.code == 2
    assert shown.out == ""
    assert what in shown.err
    assert "--help" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(("words", "what"), [entry for entry in WRONG if entry[0][-1] != "--model"])
@pytest.mark.parametrize("ask", [("--format", "json"), ("--format=json",)])
def test_wrong_usage_is_json_where_json_was_asked_for(
    words: tuple[str, ...], what: str, ask: tuple[str, ...], cli: Cli
) -> None:
    shown = cli(*words, *ask)
    assert shown.code == 2
    assert shown.error["code"] == "usage.refused"
    assert what in shown.error["what"]


def test_the_format_itself_is_checked(cli: Cli) -> None:
    shown = cli("version", "--format", "xml")
    assert (shown.code, shown.out) == (2, "")
    assert "--format" in shown.err


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("version").out == f"{__version__}\n"
    assert cli("version", as_json=True).json == {"version": __version__}


def test_every_preset_can_be_chosen() -> None:
    assert set(get_args(PresetName)) == set(PRESETS)


def test_python_m_caltrain_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "caltrain", "version", "--format", "json"], capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b'{"version":"%s"}\n' % __version__.encode()
    assert done.stderr == b""


def test_a_command_starts_without_torch() -> None:
    program = (
        "import sys; from caltrain.cli.app import run; code = run(['version']); "
        "sys.exit(code or 'torch' in sys.modules or 'sklearn' in sys.modules or 'fastapi' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False).returncode == 0
