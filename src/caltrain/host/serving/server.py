"""Run a serving host until it is told to stop: SIGTERM lets what is under way end, SIGHUP reads the folders again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from caltrain.crypto.dsse import SigningKey
from caltrain.errors import CaltrainError
from caltrain.host.confine import QUIET_THREADS
from caltrain.host.serving.app import create_app
from caltrain.host.serving.heads import PatientProtocol
from caltrain.host.serving.metrics import Metrics
from caltrain.host.serving.model import Enclave, ServedModel
from caltrain.host.serving.registry import OnReady, Registry, same_revision
from caltrain.serving.folder import PackageFolder, open_folder
from caltrain.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from caltrain.host.device import Choice
    from caltrain.host.serving.launch import Launcher

DRAIN_SECONDS = 30.0


def serve(
    packages: Sequence[Path],
    *,
    root: SigningKey,
    sock: socket.socket,
    threads: int,
    device: Choice = "auto",
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve these packages on a bound socket until SIGINT or SIGTERM; a second one does not wait.

    `on_ready` is called once every folder was opened and checked. The enclaves end with it. Then raises that signal
    again. Raises, before `on_ready` and before anything is launched, what `open_folder` does, and ConfigError
    `package.same-revision`.
    """
    try:
        check_packages(packages)
    except CaltrainError:
        sock.close()
        raise
    os.environ.update(QUIET_THREADS)  # read when torch is loaded, which is later
    keep_freed_memory()
    metrics = Metrics()

    def make(folder: PackageFolder, on_ready: OnReady) -> ServedModel:
        terms = folder.package.terms
        launch = LaunchLater(folder, root_secret=root.private_bytes(), threads=threads, device=device)
        meters = metrics.of(terms.name, str(terms.revision))
        return ServedModel(folder.package, folder.envelope, launch, meters, on_ready=on_ready)

    run(Registry(packages, make), metrics, sock=sock, on_ready=on_ready)


def run(
    registry: Registry, metrics: Metrics, *, sock: socket.socket, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve the models of a registry, whoever computes them, on a bound socket until SIGINT or SIGTERM."""
    server: _Server | None = None

    async def begin() -> None:
        await registry.reload()
        if server is not None:
            server.listen_for_hangup()

    config = uvicorn.Config(
        create_app(registry, metrics, begin=begin),
        log_level="warning",
        access_log=False,
        http=PatientProtocol,
        limit_concurrency=2048,
        timeout_keep_alive=60,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    server = _Server(config, registry)
    on_ready()
    server.run(sockets=[sock])


class _Server(uvicorn.Server):
    """Answers `serving.draining` while what is under way ends, and only then stops."""

    def __init__(self, config: uvicorn.Config, registry: Registry) -> None:
        super().__init__(config)
        self._registry = registry
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[object]] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends it."""
        if self._loop is None or self._registry.draining:
            super().handle_exit(sig, frame)
        else:
            self._registry.draining = True
            self._loop.call_soon_threadsafe(self._keep, self._drain(sig))

    def listen_for_hangup(self) -> None:
        """SIGHUP reads the folders again."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, lambda: self._keep(self._registry.reload()))

    async def _drain(self, sig: int) -> None:
        await self._registry.drain(DRAIN_SECONDS)
        super().handle_exit(sig, None)

    def _keep(self, work: Coroutine[object, object, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class LaunchLater:
    """A `Launcher` that is made when the first enclave is: the server answers before torch is loaded."""

    def __init__(self, folder: PackageFolder, *, root_secret: bytes, threads: int, device: Choice) -> None:
        self._folder, self._secret, self._threads, self._device = folder, root_secret, threads, device
        self._launcher: Launcher | None = None

    def __call__(self, on_lost: Callable[[], None]) -> Enclave:
        """See `Launcher`."""
        from caltrain.host.serving.launch import Launcher  # noqa: PLC0415

        if self._launcher is None:
            self._launcher = Launcher(
                self._folder, root_secret=self._secret, threads=self._threads, device=self._device
            )
        return self._launcher(on_lost)

    def close(self) -> None:
        """See `Launcher`."""
        if self._launcher is not None:
            self._launcher.close()


def check_packages(packages: Sequence[Path]) -> None:
    """Every folder holds a package, and no two the same version of one model. Raises ConfigError, IntegrityError."""
    seen: set[tuple[str, int]] = set()
    for path in packages:
        terms = open_folder(path).package.terms
        if (terms.name, terms.revision) in seen:
            raise same_revision(terms.name, terms.revision)
        seen.add((terms.name, terms.revision))
