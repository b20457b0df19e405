"""A serving host in a process of its own, protected or plain: told on standard input what to serve, tells its port."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from caltrain.bench.worker import say
from caltrain.crypto.dsse import SigningKey
from caltrain.host.confine import QUIET_THREADS
from caltrain.host.serving.metrics import Metrics
from caltrain.host.serving.model import ServedModel
from caltrain.host.serving.registry import Make, OnReady, Registry
from caltrain.host.serving.server import run, serve
from caltrain.listening import bind
from caltrain.serving.folder import PackageFolder
from caltrain.training.allocator import keep_freed_memory

Way = Literal["plain", "protected"]


class ServingJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to serve: a package; for the plain way the model that it was made of, too."""

    way: Way
    package: str
    model: str
    root: bytes
    threads: int


def main() -> None:
    """Read the job from standard input and serve until a signal."""
    job = msgspec.json.decode(os.read(0, 1 << 16), type=ServingJob)
    sock = bind("127.0.0.1", 0)

    def on_ready() -> None:
        say({"port": sock.getsockname()[1]})

    if job.way == "protected":
        serve([Path(job.package)], root=SigningKey(job.root), sock=sock, threads=job.threads, on_ready=on_ready)
    else:
        os.environ.update(QUIET_THREADS)
        keep_freed_memory()
        metrics = Metrics()
        run(Registry([Path(job.package)], _plain(job, metrics)), metrics, sock=sock, on_ready=on_ready)


def _plain(job: ServingJob, metrics: Metrics) -> Make:
    def make(folder: PackageFolder, on_ready: OnReady) -> ServedModel:
        from caltrain.bench.plain_server import PlainLaunch  # noqa: PLC0415  # torch, after the environment
        from caltrain.exposure.open_model import open_subject  # noqa: PLC0415

        terms = folder.package.terms
        launch = PlainLaunch(open_subject(Path(job.model)), folder.package, threads=job.threads)
        meters = metrics.of(terms.name, str(terms.revision))
        return ServedModel(folder.package, folder.envelope, launch, meters, on_ready=on_ready)

    return make
