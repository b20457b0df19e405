"""The demo's processes: the same commands that people type, started and ended together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caltrain.errors import EnvironmentFault, from_wire

_GRACE_SECONDS = 15


def command(*words: str | Path) -> list[str]:
    """A `caltrain` command line that prints JSON."""
    return [sys.executable, "-m", "caltrain", *(str(word) for word in words), "--format", "json"]


class Background:
    """A command that runs while the demo goes on; its output goes to a log beside it."""

    def __init__(self, words: Sequence[str | Path], *, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command(*words), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def first_line(self, *, seconds: float = 60) -> dict[str, Any]:
        """The first JSON line that it prints. Raises its error, or EnvironmentFault."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            head, newline, _ = self.log.read_bytes().partition(b"\n")
            if newline:
                return _parsed(head, self.log)
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise _died(self.log)

    def result(self) -> dict[str, Any]:
        """Wait for the end; what it printed. Raises its error."""
        self._process.wait()
        return _parsed(self.log.read_bytes().strip().rpartition(b"\n")[2], self.log)

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._process.poll() not in {None, 0}

    def end(self) -> None:
        """Terminate it if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Crew:
    """All background processes of a demo, ended in reverse order whatever happens."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._members: list[Background] = []

    def start(self, name: str, *words: str | Path) -> Background:
        """Start a command; `name` names its log."""
        member = Background(words, log=self._logs / f"{name}.log")
        self._members.append(member)
        return member

    def run_all(self, commands: dict[str, Sequence[str | Path]]) -> dict[str, dict[str, Any]]:
        """Run commands side by side; their results by name."""
        started = {name: self.start(name, *words) for name, words in commands.items()}
        return {name: member.result() for name, member in started.items()}

    def end(self) -> None:
        """End all."""
        for member in reversed(self._members):
            member.end()


@contextmanager
def crew(logs: Path) -> Iterator[Crew]:
    """A crew that leaves no process behind."""
    members = Crew(logs)
    try:
        yield members
    finally:
        members.end()


def _parsed(line: bytes, log: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        raise _died(log) from None
    if not isinstance(value, dict):
        raise _died(log)
    if "error" in value and isinstance(value["error"], dict):
        raise from_wire(value["error"])
    return value


def _died(log: Path) -> EnvironmentFault:
    tail = log.read_bytes()[-500:].decode(errors="replace") if log.exists() else ""
    return EnvironmentFault(
        "demo.process-failed",
        f"a process of the demo ended early; its log {log} ends with: {tail or 'nothing'}",
        step="run demo",
        fix="Read the log; `caltrain doctor` says what this machine lacks.",
    )
