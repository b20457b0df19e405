"""Kill host, enclave or both at random moments of a run, take it up each time, and compare the bits: a long run.

    python scripts/kill_many.py --kills 50

Every process is a command that people type: `host serve`, `party seal`, `party join`, `party rejoin`. The joins live
through all of it. A moment is so many seconds after the host was started, or after the parties gave their word, drawn
from --seed; so kills hit the start, attestation, ingest, training, checkpoints, release and link as they come. One run
follows another until there were enough kills. Prints a table; exits with 1 unless each model is, bit for bit, that of
the plain loop with the run's seed, and each join survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file

from caltrain.errors import CaltrainError
from caltrain.host.kept import kept_events
from caltrain.host.store import Store
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.receive import RunRecord
from caltrain.presets import PRESETS
from caltrain.project import Project, create_project
from caltrain.records.readers import Dataset, load
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds

PARTIES = ("alder", "birch")
WHO = ("host", "enclave", "both")
EARLY, LATE = 4.0, 12.0  # seconds after the host was started, after the words were given
PATIENCE = 300.0


def command(*words: str | Path) -> list[str]:
    """A command line that prints JSON."""
    return [sys.executable, "-m", "caltrain", *map(str, words), "--format", "json"]


class Trial:
    """One run, with everything that it takes to interrupt and resume it."""

    def __init__(self, folder: Path, *, epochs: int) -> None:
        preset = PRESETS["digits"]
        training = msgspec.structs.replace(preset.training, epochs=epochs, checkpoint_steps=7)
        self.project: Project = create_project(
            folder / "project",
            preset=msgspec.structs.replace(preset, training=training),
            title="kill many",
            parties=PARTIES,
            users=("una",),
            reveal_seed=True,
        )
        self.folder, self.port = folder, "0"
        self.data = _halves(load("digits", None, download=False).train)
        for name, part in self.data.items():
            file = folder / f"{name}.npz"
            images = part.images[:, 0]
            np.savez(file, x_train=images, y_train=part.labels, x_test=images[:1], y_test=part.labels[:1])
            subprocess.run(
                [
                    *command("party", "seal", "--home", self._home(name), *self._plan, "--data", file),
                    "--drop-duplicates",
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        self.serve("--auto-start")
        self.joins = {name: self._start(f"join-{name}", *self._party("join", name)) for name in PARTIES}
        store = Store(folder / "host")
        wait_for(lambda: _resumable(store), "the run can be resumed")

    @property
    def _plan(self) -> tuple[str | Path, ...]:
        return "--plan", self.project.plan_path

    def _home(self, name: str) -> Path:
        return self.project.parties[name].folder

    def _party(self, verb: str, name: str) -> tuple[str | Path, ...]:
        policy = ("--policy", self.project.policy_path)
        return ("party", verb, self.url, "--home", self._home(name), *self._plan, *policy)

    def _start(self, log: str, *words: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("ab") as out:
            return subprocess.Popen(command(*words), stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def serve(self, *more: str) -> None:
        """Start the host; again at the same port."""
        log = self.folder / "serve.log"
        log.unlink(missing_ok=True)
        root = self.project.operator.folder
        folders = ("--folder", self.folder / "host", "--root", root)
        self.host = self._start("serve", "host", "serve", *self._plan, *folders, "--port", self.port, *more)
        wait_for(lambda: b"\n" in log.read_bytes() or self.host.poll() is not None, "the host serves")
        said = json.loads(log.read_bytes().splitlines()[0])
        self.url = str(said["url"])
        self.port = self.url.rpartition(":")[2]

    def give_words(self) -> None:
        """Every party's `rejoin`."""
        given = [self._start(f"rejoin-{name}", *self._party("rejoin", name)) for name in PARTIES]
        for process in given:
            process.wait(PATIENCE)

    def status(self) -> RunStatus | None:
        """The host's word on the run, if it gives one."""
        try:
            with HostClient(self.url) as client:
                return client.status()
        except CaltrainError:
            return None

    def kill(self, who: str) -> str:
        """Kill, at once; returns where the run was."""
        status, children = self.status(), _descendants(self.host.pid)
        victims = ([] if who == "host" else children) + ([] if who == "enclave" else [self.host.pid])
        for pid in victims:
            _kill(pid)
        if who == "enclave":  # the host lives on, until its operator ends it
            time.sleep(0.5)
            self.host.terminate()
        self.host.wait(PATIENCE)
        for pid in children:
            _kill(pid)
        return _place(status)

    def fault(self) -> str:
        """What is wrong with the end: a join that did not survive, or other bits than the plain loop's; or nothing."""
        for name, process in self.joins.items():
            if process.wait(PATIENCE):
                return (self.folder / f"join-{name}.log").read_text()[-500:]
        return "" if self._same_bits() else "OTHER BITS"

    def _same_bits(self) -> bool:
        models = [next((self._home(name) / "runs").glob("*/run.json")).parent for name in PARTIES]
        record = msgspec.json.decode((models[0] / "run.json").read_bytes(), type=RunRecord)
        plan = self.project.plan
        rows = {name: _distinct(part) for name, part in self.data.items()}
        plain = train_plain(
            plan.model,
            plan.partition,
            plan.data,
            plan.training,
            pixels=torch.from_numpy(np.concatenate([self.data[name].images[rows[name]] for name in PARTIES])),
            labels=torch.from_numpy(np.concatenate([self.data[name].labels[rows[name]] for name in PARTIES])),
            seeds=RunSeeds.from_run_seed(bytes.fromhex(record.run_seed)),
        ).state_dict()
        found = [load_file(model / "model.safetensors") for model in models]
        return all(
            weights.keys() == plain.keys() and all(torch.equal(plain[n].contiguous(), weights[n]) for n in plain)
            for weights in found
        )

    def end(self) -> None:
        """Leave no process behind."""
        for pid in [*_descendants(self.host.pid), self.host.pid, *(p.pid for p in self.joins.values())]:
            _kill(pid)


def run(trial: Trial, draw: random.Random, *, kills: int) -> list[tuple[str, str]]:
    """Interrupt one run up to so often, then see it to its end: who was killed, and where, each time."""
    struck: list[tuple[str, str]] = []
    given = True  # the first life: the joins have done all that is needed
    while len(struck) < kills:
        wait = draw.uniform(0, LATE if given else EARLY)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and not _linked(trial.status()):
            time.sleep(0.05)
        if _linked(trial.status()):
            return struck
        who = draw.choice(WHO)
        struck.append((who, trial.kill(who)))
        sys.stdout.write(f"{len(struck):3}  {who:8} {struck[-1][1]}\n")
        sys.stdout.flush()
        trial.serve("--resume")
        given = draw.random() < 0.75
        if given:
            trial.give_words()
    if not given:
        trial.give_words()
    wait_for(lambda: _linked(trial.status()), "the run has ended")
    return struck


def wait_for(true: Any, what: str) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"still not: {what}")
        time.sleep(0.1)


def _halves(data: Dataset) -> dict[str, Dataset]:
    middle = len(data) // 2
    parts = (slice(0, middle), slice(middle, None))
    return {
        name: Dataset(np.ascontiguousarray(data.images[part]), data.labels[part], data.class_names)
        for name, part in zip(PARTIES, parts, strict=True)
    }


def _distinct(part: Dataset) -> list[int]:
    """The rows that `--drop-duplicates` keeps."""
    first: dict[bytes, int] = {}
    for row, image in enumerate(part.images):
        first.setdefault(image.tobytes(), row)
    return sorted(first.values())


def _resumable(store: Store) -> bool:
    try:
        return any(event.kind == "checkpoint" for event in kept_events(store))
    except CaltrainError:
        return False


def _linked(status: RunStatus | None) -> bool:
    return status is not None and status.phase == "linked"


def _place(status: RunStatus | None) -> str:
    if status is None:
        return "no answer yet"
    return f"{status.phase} {status.epoch}.{status.done}" if status.phase == "train" else status.phase


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, task.read_text().split())
        except OSError:
            continue  # it has ended
    return found[1:]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def begun(*, epochs: int) -> Iterator[Trial]:
    """A trial in a folder of its own that leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="kill-many-") as folder:
        trial = Trial(Path(folder), epochs=epochs)
        try:
            yield trial
        finally:
            trial.end()


def main() -> int:
    """Runs until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=10, help="at most so many in one run")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    done, failed = 0, 0
    draw = random.Random(chosen.seed)  # noqa: S311  # moments to kill at, that can be had again
    while done < chosen.kills:
        with begun(epochs=chosen.epochs) as trial:
            struck = run(trial, draw, kills=min(chosen.per_run, chosen.kills - done))
            fault = trial.fault()
        done, failed = done + len(struck), failed + bool(fault)
        sys.stdout.write(f"run over after {len(struck)} kills: {fault or 'same bits'}\n")
    sys.stdout.write(f"{done} kills, {failed} runs that did not end as they should\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
