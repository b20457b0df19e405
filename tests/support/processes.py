"""Which processes are alive, as the kernel says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process: its number can come back, its start cannot."""

    pid: int
    started: int


def alive(pid: int) -> bool:
    """Whether there is a process of that number which has not ended."""
    return _stat(pid)[0] not in {"", "Z", "X"}


def living(process: Process) -> bool:
    """Whether this very process has not ended."""
    state, _, started = _stat(process.pid)
    return state not in {"", "Z", "X"} and started == process.started


def descendants(pid: int) -> set[Process]:
    """All processes below this one."""
    children: dict[int, list[Process]] = {}
    for number in _numbers():
        _, parent, started = _stat(number)
        children.setdefault(parent, []).append(Process(number, started))
    found: set[Process] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child.pid)
    return found


def marked(text: str) -> set[Process]:
    """All processes that have `text` in their environment or on their command line."""
    found = set()
    for number in _numbers():
        words = b""
        for name in ("environ", "cmdline"):
            try:
                words += Path(f"/proc/{number}/{name}").read_bytes()
            except OSError:
                continue  # ended meanwhile, or not ours
        if text.encode() in words and number != os.getpid():
            found.add(Process(number, _stat(number)[2]))
    return {process for process in found if living(process)}


def wait_until(true: Callable[[], bool], *, seconds: float = 60) -> None:
    """Fail unless `true` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.05)


def _numbers() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _stat(pid: int) -> tuple[str, int, int]:
    """(state, parent, start time), or ("", 0, 0) when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0, 0
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
