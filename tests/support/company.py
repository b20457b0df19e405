"""Two parties, a model user and a host process with its enclave program: a tiny run, for real."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from caltrain.attestation.measurement import measure_enclave
from caltrain.attestation.verify import Policy
from caltrain.crypto.dsse import SigningKey
from caltrain.host_client import HostClient, RunStatus
from caltrain.models.spec import Partition
from caltrain.participant.identity import create_identity
from caltrain.participant.join import join
from caltrain.participant.seal import seal_records
from caltrain.plan import EnclaveSpec, Party, Plan, RunManifest, TraceSpec, User, check_plan
from caltrain.records.schema import DataSchema
from caltrain.training.spec import TrainingSpec
from support.world import CLASSES, MODEL, SHAPE, pictures

SECONDS = 240
LABELS = np.arange(16) % len(CLASSES)
PROGRAM = Path(__file__).with_name("host_program.py")


def eventually(true: Callable[[], bool], what: str, *, seconds: float = SECONDS) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)


class Company:
    """Alpha and beta join a host's run in threads, each for `patience` seconds.

    `results` and `errors` are what came of it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int,
        confined: bool = True,
        change: Callable[[Plan], Plan] = lambda plan: plan,
        death: str = "",
        patience: float = SECONDS,
    ) -> None:
        self.folder, self._confined, self._patience = folder, confined, patience
        self.parties = [create_identity(folder / name, name) for name in ("alpha", "beta")]
        self.user = create_identity(folder / "una", "una")
        self.root, measurement = SigningKey(), measure_enclave()
        plan = Plan(
            version=1,
            name="tiny",
            model=MODEL,
            partition=Partition(front=2, head=2),
            data=DataSchema(shape=SHAPE, classes=CLASSES),
            training=TrainingSpec(epochs=epochs, batch=8, learning_rate=0.05, threads=1),
            parties=tuple(Party(name=p.name, public_key=p.signer.public) for p in self.parties),
            users=(
                User(name="una", public_key=self.user.signer.public, may=("predict", "trace", "verdict"), budget=100),
            ),
            enclave=EnclaveSpec(measurement=measurement),
            trace=TraceSpec(neighbours=3, suspicion_neighbours=3),
        )
        self.plan = check_plan(change(plan))
        self.policy = Policy(measurements=(measurement,), allow_simulated=True, simulated_roots=(self.root.public,))
        self.sealed = [
            seal_records(party, self.plan.data, pictures(16, seed=seed), LABELS, shard_records=8)
            for seed, party in enumerate(self.parties)
        ]
        self.results: dict[str, RunManifest] = {}
        self.errors: dict[str, Exception] = {}
        self.steps: dict[str, list[str]] = {party.name: [] for party in self.parties}
        self._threads: list[threading.Thread] = []
        (self.folder / "plan.json").write_bytes(msgspec.json.encode(self.plan))
        (self.folder / "root").write_bytes(self.root.private_bytes())
        self.port, self.given_up = "0", False
        self.serve(*([death] if death else []))

    def serve(self, *more: str) -> None:
        """Start the host, again at the same port; `more` is what `host_program` takes."""
        arguments = [str(self.folder / name) for name in ("plan.json", "host", "root")] + [self.port, *more]
        with (self.folder / "host.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                # Without a PATH there is no bubblewrap to be found.
                env=os.environ | ({} if self._confined else {"PATH": "/nonexistent"}),
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.port = self.process.stdout.readline().decode().strip()
        assert self.port, (self.folder / "host.log").read_text()
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        """The host's folder."""
        return self.folder / "host"

    def client(self) -> HostClient:
        """A connection to the host."""
        return HostClient(self.url)

    def status(self) -> RunStatus:
        """What the host says of the run."""
        with self.client() as client:
            return client.status()

    def join(self) -> None:
        """All parties join, each in a thread."""

        def run(number: int) -> None:
            party = self.parties[number]
            try:
                with _Patient(self) as client:
                    self.results[party.name] = join(
                        client,
                        self.plan,
                        party,
                        self.policy,
                        clock=lambda: datetime.now(UTC),
                        seconds=self._patience,
                        on_step=self.steps[party.name].append,
                    )
            except Exception as error:  # noqa: BLE001  # whatever it is, the test looks at it
                self.errors[party.name] = error

        self._threads = [threading.Thread(target=run, args=(number,)) for number in range(len(self.parties))]
        for thread in self._threads:
            thread.start()

    def joined(self) -> None:
        """Wait until all parties are done, well or badly."""
        for thread in self._threads:
            thread.join(self._patience)
            assert not thread.is_alive()

    def training(self) -> None:
        """Join, and wait until training is under way."""
        self.join()
        eventually(lambda: self.status().epoch > 1 or bool(self.errors), "training is under way")
        assert not self.errors, self.errors

    def descendants(self) -> list[int]:
        """Processes that come of the host, its enclave among them."""
        found, parents = [self.process.pid], _parents()
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]

    def enclave(self) -> int:
        """The enclave program."""
        (pid,) = [
            pid
            for pid in self.descendants()
            if b"caltrain.enclave" in _read(pid, "cmdline") and b"bwrap" not in _read(pid, "cmdline")
        ]
        return pid

    def end(self) -> None:
        """Leave no process behind; those who join have waited long enough."""
        self.stop()
        self.given_up = True
        self.joined()

    def stop(self) -> None:
        """End the host and its enclave at once, by signal."""
        children = self.descendants()
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        eventually(lambda: not any(alive(pid) for pid in children), "no process is left")


class _Patient(HostClient):
    """A connection for as long as the company has patience."""

    def __init__(self, company: Company) -> None:
        super().__init__(company.url)
        self._company = company

    def status(self) -> RunStatus:
        if self._company.given_up:
            raise TimeoutError("the test is over")
        return super().status()


def alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and that nobody asked about does not)."""
    stat = _read(pid, "stat")
    return bool(stat) and stat.rpartition(b")")[2].split()[0] != b"Z"


def _parents() -> dict[int, int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    stats = {pid: _read(pid, "stat") for pid in numbers}
    return {pid: int(stat.rpartition(b")")[2].split()[1]) for pid, stat in stats.items() if stat}


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
