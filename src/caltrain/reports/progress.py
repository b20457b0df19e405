"""A run as it goes on: a bar with epoch, loss, images a second and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caltrain.errors import EnvironmentFault, from_wire
from caltrain.host_client import HostClient, RunStatus
from caltrain.reports.terminal import plain
from caltrain.reports.tracking import Follower, Sink

_POLL, _READ_LOG = 0.2, 1.0
_MAX_TEXT = 60
OnStatus = Callable[[RunStatus], None]


def watch(
    host: HostClient,
    *,
    seconds: float,
    console: Console,
    sinks: Sequence[Sink] = (),
    on_status: OnStatus = lambda _: None,
) -> RunStatus:
    """Show progress until the run is linked. Its log goes to `sinks`, each status to `on_status`.

    Raises the run's error, or `host.too-slow`.
    """
    deadline, follower, next_read = time.monotonic() + seconds, Follower(host, sinks), 0.0
    with _bar(console) as bar:
        task = bar.add_task("", total=None, figures="")
        while True:
            status = host.status()
            if status.error is not None:
                raise from_wire(status.error)
            bar.update(task, **line(status))
            on_status(status)
            if status.phase == "linked" or time.monotonic() >= next_read:
                follower.follow()
                next_read = time.monotonic() + _READ_LOG
            if status.phase == "linked":
                return status
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    "host.too-slow",
                    f"after {seconds:.0f} s the run is in phase {status.phase!r:.60}",
                    step="watch run",
                    fix="Watch it again, or wait longer with --timeout.",
                )
            time.sleep(_POLL)


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that goes on by as many as it is called with."""
    with _bar(console) as bar:
        task = bar.add_task(what, total=total, figures="")
        yield lambda more: bar.advance(task, more)


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """Something that moves, and for how long already, where nobody can say how long it will take."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not _seen(console)) as bar:
        bar.add_task(what, total=None)
        yield


def _seen(console: Console) -> bool:
    return console.is_interactive and not console.quiet


def _bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
        expand=True,
        disable=not _seen(console),
    )


def line(status: RunStatus) -> dict[str, Any]:
    """What the bar shows of a status: description, total, completed, figures. The words are the host's: bounded."""
    if status.phase == "train":
        share = status.done / max(status.total, 1)
        return {
            "description": f"epoch {status.epoch}/{status.epochs}",
            "total": status.epochs,
            "completed": status.epoch - 1 + share,
            "figures": training_figures(status),
        }
    waiting = f"waiting for {', '.join(status.waiting_for)}" if status.waiting_for else ""
    return {
        "description": _short(status.phase),
        "total": status.total or None,
        "completed": status.done,
        "figures": _short(waiting),
    }


def training_figures(status: RunStatus) -> str:
    """Loss and speed, as far as they are known."""
    loss = "" if status.loss is None else f"loss {status.loss:.4f}"
    held = "" if status.held_out is None else f"held-out {status.held_out.top1:.1%}"
    speed = "" if status.images_per_second is None else f"{status.images_per_second:,.0f} images/s"
    return ", ".join(part for part in (loss, held, speed) if part)


def _short(text: str) -> str:
    clean = plain(text).plain
    return clean if len(clean) <= _MAX_TEXT else clean[: _MAX_TEXT - 1] + "…"
