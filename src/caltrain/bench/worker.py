"""One way of training in a process of its own: see `main`, told on standard input what to do.

Line by line in JSON: first a `Job`; then, once it says `ready`, a number of steps at a time, each answered with the
seconds that they took. Between two of them it stands still: the plain loop after a step, a protected run when the next
IR has just arrived, so that what is timed are whole cycles of the same work.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Literal, NoReturn

import msgspec

from caltrain.host.confine import QUIET_THREADS
from caltrain.training.allocator import keep_freed_memory

Way = Literal["plain", "two-way", "ternary"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to train: a preset as JSON, records to draw, whether the waiting threads sleep."""

    way: Way
    preset: bytes
    records: int
    quiet: bool = True
    device: Literal["cpu", "auto"] = "cpu"


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """After the last step: greatest memory of the processes, bytes that crossed in one record's step."""

    peak_rss_mb: float
    bytes_out_per_image: float = 0.0
    bytes_in_per_image: float = 0.0


class Stopped(Exception):
    """There are no more steps to take."""


class Gate:
    """Lets a number of steps through at a time, and tells how long they took."""

    def __init__(self) -> None:
        self._left, self._began = 0, 0.0
        self._first = True

    def step(self) -> None:
        """A step is over (or, before the first, everything is ready): wait here when it was the last one allowed."""
        self._left -= 1
        if self._left > 0:
            return
        if self._first:
            say({"ready": True})
            self._first = False
        else:
            say({"seconds": time.perf_counter() - self._began})
        line = sys.stdin.readline()
        if not line.strip():
            raise Stopped
        self._left, self._began = int(line), time.perf_counter()


def say(value: object) -> None:
    """One line to whoever started us."""
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def main() -> NoReturn:
    """Read the job, and work until there are no more steps."""
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    if job.quiet:
        os.environ.update(QUIET_THREADS)
    keep_freed_memory()
    from caltrain.bench.training_ways import plain_way, protected_way  # noqa: PLC0415  # after the environment

    gate = Gate()
    peak = plain_way(job, gate) if job.way == "plain" else protected_way(job, gate)
    say(peak)
    sys.stdout.flush()
    os._exit(0)  # threads that wait for more steps have nothing left to do
