"""The demo's processes: the same commands that people type, started and ended together."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from caltrain.errors import EnvironmentFault, from_wire

_GRACE_SECONDS = 15
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def command(*words: str | Path) -> list[str]:
    """A `caltrain` command line that prints JSON."""
    return [sys.executable, "-m", "caltrain", *(str(word) for word in words), "--format", "json"]


class Background:
    """A command that runs while the demo goes on; its output goes to a log beside it."""

    def __init__(self, argv: Sequence[str], *, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            # A session of its own: Ctrl-C reaches the demo alone, which then ends everything in order.
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def first_line(self, *, seconds: float = 60) -> dict[str, Any]:
        """The first JSON line that it prints. Raises its error, or EnvironmentFault."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None  # asked first: what it printed last is then in the log
            head, newline, _ = self.log.read_bytes().partition(b"\n")
            if newline:
                return _parsed(head, self.log)
            if ended:
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

    def terminate(self) -> None:
        """Ask it to end, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self, *, deadline: float) -> None:
        """Wait for its end until `deadline` (of the monotonic clock), then kill it."""
        try:
            self._process.wait(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Crew:
    """All background processes of a demo, ended together whatever happens."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._members: list[Background] = []

    def start(self, name: str, *words: str | Path) -> Background:
        """Start a command; `name` names its log."""
        with undisturbed():
            member = Background(command(*words), log=self._logs / f"{name}.log")
            self._members.append(member)
        return member

    def run_all(self, commands: Mapping[str, Sequence[str | Path]]) -> dict[str, dict[str, Any]]:
        """Run commands side by side; their results by name."""
        started = {name: self.start(name, *words) for name, words in commands.items()}
        return {name: member.result() for name, member in started.items()}

    def end(self) -> None:
        """End all, the last started first."""
        with undisturbed():
            for member in reversed(self._members):
                member.terminate()
            deadline = time.monotonic() + _GRACE_SECONDS
            for member in reversed(self._members):
                member.end(deadline=deadline)


@contextmanager
def crew(logs: Path) -> Iterator[Crew]:
    """A crew that leaves no process behind."""
    members = Crew(logs)
    try:
        yield members
    finally:
        members.end()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back Ctrl-C and its like until the block ends: every process that was started is then on record.

    For the main thread, whose signals they are.
    """
    held: list[int] = []
    former = {number: signal.signal(number, lambda n, _: held.append(n)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _parsed(line: bytes, log: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise _died(log) from None
    if not isinstance(value, dict):
        raise _died(log)
    if "error" in value and isinstance(value["error"], dict):
        raise from_wire(value["error"])
    return value


def _died(log: Path) -> EnvironmentFault:
    tail = log.read_bytes()[-500:].decode(errors="replace")
    return EnvironmentFault(
        "demo.process-failed",
        f"a process of the demo ended early; its log {log} ends with: {tail or 'nothing'}",
        step="run demo",
        fix="Read the log; `caltrain doctor` says what this machine lacks.",
    )
