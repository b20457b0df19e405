"""Two serving hosts side by side, protected and plain, and clients for each."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import numpy as np

from caltrain.attestation.verify import Policy
from caltrain.bench.load import Ask
from caltrain.bench.memory import peak_mb
from caltrain.bench.plain_server import HEAD
from caltrain.bench.serving_process import ServingJob, Way
from caltrain.client.served import AsyncServedModel, Expectations
from caltrain.crypto.aead import TAG_BYTES
from caltrain.crypto.dsse import SigningKey
from caltrain.errors import EnvironmentFault
from caltrain.host_client import HostClient
from caltrain.owner.grant import await_enclave, grant
from caltrain.serving.folder import open_folder
from caltrain.serving.oip import pack_sealed
from caltrain.serving.package import Package
from caltrain.serving.session import SessionRequest

CLIENTS_A_SESSION = 8
USER = "user"
_TRIES = 1200


@dataclass(frozen=True)
class Contest:
    """A package on disk, the model that it was made of, and everybody's keys."""

    name: str
    package: Path
    model: Path
    owner: SigningKey
    data_key: bytes
    user: SigningKey
    root: SigningKey
    threads: int

    def manifest(self) -> Package:
        """The package's manifest."""
        return open_folder(self.package, self.owner.public).package

    def policy(self) -> Policy:
        """What owner and user accept."""
        measurement = self.manifest().terms.measurement
        return Policy(measurements=(measurement,), allow_simulated=True, simulated_roots=(self.root.public,))


@dataclass(frozen=True)
class Server:
    """A serving host's process."""

    process: subprocess.Popen[bytes]
    url: str

    def peak_rss_mb(self) -> float:
        """Greatest memory of the host and its enclave, together."""
        return peak_mb(self.process.pid)


@contextmanager
def serving(contest: Contest, way: Way) -> Iterator[Server]:
    command = [sys.executable, "-c", "from caltrain.bench.serving_process import main; main()"]
    job = ServingJob(
        way=way,
        package=str(contest.package),
        model=str(contest.model),
        root=contest.root.private_bytes(),
        threads=contest.threads,
    )
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            if process.stdin is None or process.stdout is None:  # as Popen was told
                raise _died(way)
            process.stdin.write(msgspec.json.encode(job))
            process.stdin.close()
            line = process.stdout.readline()
            if not line:
                raise _died(way)
            yield Server(process, f"http://127.0.0.1:{msgspec.json.decode(line)['port']}")
        finally:
            process.terminate()


def _died(way: Way) -> EnvironmentFault:
    return EnvironmentFault(
        "bench.worker-died",
        f"the {way} server ended at once",
        step="bench infer",
        fix="Read what it wrote to standard error.",
    )


def grant_key(contest: Contest, url: str) -> None:
    """As the owner, hand over the key once the enclave waits for it. Raises what `grant` does."""
    with HostClient(url) as host:
        package = contest.manifest()
        await_enclave(host, package, tries=_TRIES, pause=lambda: time.sleep(0.1))
        grant(
            host,
            package,
            contest.policy(),
            signer=contest.owner,
            data_key=contest.data_key,
            clock=lambda: datetime.now(UTC),
        )


def open_plain(contest: Contest, url: str) -> None:
    package = contest.manifest()
    with HostClient(url) as host:
        await_enclave(host, package, tries=_TRIES, pause=lambda: time.sleep(0.1))
        host.post_bytes(f"/v2/models/{package.terms.name}/grant", contest.owner.sign("grant", {}), limit=1 << 20)


def _session_request(contest: Contest) -> bytes:
    return msgspec.json.encode(SessionRequest(envelope=contest.user.sign("session", {})))


def _records(package: Package, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    drawn = np.random.default_rng(0).integers(0, 256, (count, *package.data.shape))
    return drawn.astype(package.data.numpy_dtype)


@asynccontextmanager
async def protected_clients(contest: Contest, url: str, clients: int) -> AsyncIterator[Ask]:
    """Protected: a session for every few clients."""
    package = contest.manifest()
    expected = Expectations(owner=contest.owner.public, policy=contest.policy(), user=USER, signer=contest.user)
    record = _records(package, 1)
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                await AsyncServedModel.connect(url, package.terms.name, expected, clock=lambda: datetime.now(UTC))
            )
            for _ in range(-(-clients // CLIENTS_A_SESSION))
        ]

        async def ask(number: int) -> None:
            await sessions[number // CLIENTS_A_SESSION].predict(record)

        yield ask


@asynccontextmanager
async def plain_clients(contest: Contest, url: str) -> AsyncIterator[Ask]:
    """Plain: frames of the same size, with the record in clear."""
    package = contest.manifest()
    place = f"/v2/models/{package.terms.name}"
    record = _records(package, 1).tobytes()
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        session = (await http.post(f"{place}/sessions", content=_session_request(contest))).text
        frame = b"\x01" + bytes.fromhex(session) + bytes(HEAD - 17) + record + bytes(TAG_BYTES)
        body, headers = pack_sealed(frame)

        async def ask(number: int) -> None:
            del number
            (await http.post(f"{place}/infer", content=body, headers=headers)).raise_for_status()

        yield ask
