"""Run the host server until it is told to stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from caltrain.crypto.dsse import SigningKey
from caltrain.errors import CaltrainError
from caltrain.host.api import create_app
from caltrain.host.conductor import Conductor
from caltrain.host.confine import QUIET_THREADS
from caltrain.host.given import Given, check_given, keep_given
from caltrain.host.kept import check_holds_run, check_nothing_lost, check_resumable
from caltrain.host.store import Store
from caltrain.plan import Plan
from caltrain.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from caltrain.host.device import Choice


def serve(
    plan: Plan,
    *,
    folder: Path,
    sock: socket.socket,
    root: SigningKey,
    auto_start: bool,
    resume: bool = False,
    anew: bool = False,
    device: Choice = "auto",
    given: Given | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve one run, or `resume` the one that lies in `folder`, on a bound socket until SIGINT or SIGTERM.

    An unfinished run in the folder is given up only with `anew`. `given` are files that the plan names. `on_ready` is
    called once the folder is checked and taken. The enclave ends with it. Then raises that signal again.

    Raises, before `on_ready` and before anything is launched: EnvironmentFault for a folder that cannot be used,
    ConfigError for files that are not the plan's or a run that would be lost, ProtocolError or ConfigError for a folder
    without a run of this plan to resume.
    """
    try:
        store = _ready_store(plan, folder, given or {}, resume=resume, anew=anew)
    except CaltrainError:
        sock.close()
        raise
    os.environ.update(QUIET_THREADS)  # read when torch is loaded, which is later
    keep_freed_memory()
    conductor = Conductor(
        plan, store, root_secret=root.private_bytes(), auto_start=auto_start, resume=resume, device=device
    )
    config = uvicorn.Config(
        create_app(conductor),
        log_level="warning",
        access_log=False,
        limit_concurrency=256,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    on_ready()
    uvicorn.Server(config).run(sockets=[sock])


def _ready_store(plan: Plan, folder: Path, given: Given, *, resume: bool, anew: bool) -> Store:
    """The folder, ours alone, with all that the run needs of it and of the operator's files."""
    check_given(plan, given, kept=folder if resume else None)
    if resume:
        check_holds_run(folder)
    store = Store(folder)
    if not (resume or anew):
        check_nothing_lost(store)
    store.renew(resume=resume)
    if resume:
        check_resumable(store, plan)
    keep_given(store, given)
    return store
