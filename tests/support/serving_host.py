"""A serving host in one process: its real application; enclaves that are the real loop in a thread, or played.

async with hosted(folder, terms...) as host:
    await host.grant()
    una = await host.session("una")
    answer = await host.infer(una.seal(pictures))
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import STORAGE_CALLS
from caltrain.boundary.sealed import open_for, seal_message, transcript_digest
from caltrain.boundary.serving import LoadPackage
from caltrain.crypto.dsse import Envelope
from caltrain.enclave.serve import serving_main
from caltrain.errors import CaltrainError, EnvironmentFault
from caltrain.host.serving.app import create_app
from caltrain.host.serving.bodies import Bodies
from caltrain.host.serving.center import ServedCenter
from caltrain.host.serving.enclave import Center, ServingEnclave
from caltrain.host.serving.launch import answer
from caltrain.host.serving.metrics import Metrics
from caltrain.host.serving.model import Launch, ServedModel
from caltrain.host.serving.registry import OnReady, Registry
from caltrain.owner.package import package_key
from caltrain.serving.folder import PackageFolder, open_folder
from caltrain.serving.oip import LENGTH_HEADER, pack_sealed, unpack_sealed_reply
from caltrain.serving.package import CENTER, INSIDE, PackageKey
from caltrain.serving.session import SessionOpened, SessionRequest, SessionSecret
from support.samples import signer
from support.served import DATA_KEY, Records, User, tiny_package, tiny_subject, tiny_terms
from support.tiny import MEASUREMENT

Play = Callable[[Channel], None]
SECONDS = 20
_BUFFER = 8 << 20


class Ended:
    """Stands for the enclave's program: to kill it closes its end of the door."""

    def __init__(self, *ends: socket.socket) -> None:
        self._ends = ends
        self.killed = False

    def kill(self) -> None:
        """End it."""
        self.killed = True
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout: float | None = None) -> int:
        """It has ended."""
        del timeout
        return -9


def door() -> tuple[socket.socket, socket.socket]:
    """Both ends of a stream that waits for ever, and holds enough that no test hangs in sending."""
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return ends


class PlayedLaunch:
    """Starts enclaves that the test plays, each in a thread; it counts them and can kill the last one."""

    def __init__(self, play: Play, center: Center, *, run: str = "0" * 32, package: Envelope | None = None) -> None:
        self._play, self._center, self._run, self._package = play, center, run, package
        self.programs: list[Ended] = []
        self.closed = False
        self.fails = 0
        """So many of the next launches fail."""

    def __call__(self, on_lost: Callable[[], None]) -> ServingEnclave:
        """See `Launch`."""
        if self.fails:
            self.fails -= 1
            raise EnvironmentFault("enclave.did-not-start", "no", step="launch", fix="Try again.")
        ours, theirs = door()
        program = Ended(theirs)
        self.programs.append(program)
        threading.Thread(target=self._played, args=(theirs,), daemon=True).start()
        enclave = ServingEnclave(program, Channel(ours), run=self._run, center=self._center, on_lost=on_lost)
        if self._package is not None:
            enclave.ask(LoadPackage(self._package)).result(SECONDS)
        return enclave

    def _played(self, end: socket.socket) -> None:
        with contextlib.suppress(CaltrainError):
            self._play(Channel(end))
        end.close()

    def kill(self) -> None:
        """The enclave dies."""
        self.programs[-1].kill()

    def close(self) -> None:
        """See `Launch`."""
        self.closed = True
        if isinstance(self._center, ServedCenter):
            self._center.stop()


def real_launch(folder: PackageFolder, *, center: Center | None = None) -> PlayedLaunch:
    """Enclaves that are the real loop over this package, and its real CenterNet."""
    parts = {name: (folder.folder / name).read_bytes() for name in (INSIDE, CENTER)}

    def store(end: Channel) -> None:
        with contextlib.suppress(CaltrainError):
            while True:
                call = end.receive(STORAGE_CALLS)
                end.send(answer(_Files(parts), call))
        end.close()

    def play(end: Channel) -> None:
        ours, theirs = socket.socketpair()
        threading.Thread(target=store, args=(Channel(ours),), daemon=True).start()
        try:
            serving_main(end, SimulatedAttester(signer("root"), measurement=MEASUREMENT), Channel(theirs))
        finally:
            theirs.close()

    made = center or ServedCenter(folder.package, folder.center(), threads=1)
    return PlayedLaunch(play, made, run=folder.package.id, package=folder.envelope)


class _Files(dict[str, Any]):
    """The parts as files in memory, which have descriptors too."""

    def __init__(self, parts: dict[str, bytes]) -> None:
        super().__init__()
        for name, raw in parts.items():
            self[name] = _InMemory(raw)


class _InMemory:
    def __init__(self, raw: bytes) -> None:
        self._fd = os.memfd_create("part")
        os.write(self._fd, raw)

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fd

    def __del__(self) -> None:
        os.close(self._fd)


class Host:
    """The application over HTTP without a network, its owner and its users."""

    def __init__(self, registry: Registry, metrics: Metrics, client: httpx.AsyncClient, launches: list[Launch]) -> None:
        self.registry, self.metrics, self.client, self._launches = registry, metrics, client, launches

    @property
    def launch(self) -> PlayedLaunch:
        """Of the package that was loaded last."""
        last = self._launches[-1]
        assert isinstance(last, PlayedLaunch)
        return last

    @property
    def model(self) -> ServedModel:
        """The newest version."""
        return self.registry.versions("tiny")[-1]

    async def until(self, phase: str, model: ServedModel | None = None) -> None:
        """Wait for a model's phase."""
        async with asyncio.timeout(SECONDS):
            while (model or self.model).phase != phase:
                await asyncio.sleep(0.005)

    async def attest(self, version: str | None = None) -> EvidenceBundle:
        """Evidence for a fresh nonce, by HTTP."""
        query = {"nonce": os.urandom(32).hex(), "model": "tiny"} | ({"version": version} if version else {})
        got = await self.client.get("/attestation", params=query)
        assert got.status_code == 200, got.text
        return msgspec.json.decode(msgspec.json.encode(got.json()["bundle"]), type=EvidenceBundle)

    async def grant(self, model: ServedModel | None = None) -> None:
        """The owner hands over the key."""
        model = model or self.model
        await self.until("waiting-for-key", model)
        package, place = model.package, f"/v2/models/tiny/versions/{model.version}"
        binding = (await self.attest(str(model.version))).binding
        secret = PackageKey(key=package_key(DATA_KEY, package.id))
        sealed = seal_message("grant", secret, binding=binding, sender="owner", signer=signer("owner"))
        got = await self.client.post(f"{place}/grant", content=msgspec.json.encode(sealed))
        assert got.status_code == 200, got.text
        assert msgspec.json.decode(got.content, type=Envelope).signer == binding.signing_key

    async def session(self, name: str = "una", *, version: str | None = None) -> User:
        """A user's session."""
        request, transcript, key = await self.demand(name, version=version)
        place = "/v2/models/tiny" + (f"/versions/{version}" if version else "")
        got = await self.client.post(f"{place}/sessions", content=msgspec.json.encode(request))
        assert got.status_code == 200, got.text
        opened = open_for(key, "session-opened/v1", got.content, SessionOpened, context=transcript, step="open session")
        return User(opened, key, self.registry.find("tiny", version, session=opened.session).package)

    async def demand(self, name: str, *, version: str | None = None) -> tuple[SessionRequest, str, bytes]:
        """What opens a session, its transcript and its key."""
        binding, key = (await self.attest(version)).binding, os.urandom(32)
        envelope = seal_message("session", SessionSecret(key=key), binding=binding, sender=name, signer=signer(name))
        return SessionRequest(envelope=envelope), transcript_digest(binding, name), key

    async def infer(self, frame: bytes, *, place: str = "/v2/models/tiny") -> httpx.Response:
        """Send a sealed request."""
        body, headers = pack_sealed(frame, "7")
        return await self.client.post(f"{place}/infer", content=body, headers=headers)


def sealed_of(got: httpx.Response) -> bytes:
    """The sealed answer of a reply."""
    assert got.status_code == 200, got.text
    return unpack_sealed_reply(got.content, got.headers[LENGTH_HEADER])


def error_of(got: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in the promised form."""
    body = got.json()
    assert set(body) == {"error", "detail"}
    assert set(body["detail"]) == {"family", "code", "what", "step", "fix"}
    code: str = body["detail"]["code"]
    assert body["error"].startswith(f"{code}: ")
    return got.status_code, code


def pictures(count: int, *, seed: int = 0) -> Records:
    """Distinct random records of the tiny schema."""
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4)).astype(np.uint8)


def tiny_folder(folder: Path, **terms: Any) -> PackageFolder:
    """The package of a tiny model in a folder."""
    tiny_package(folder, tiny_subject(), tiny_terms(**terms))
    return open_folder(folder)


@contextlib.asynccontextmanager
async def hosted(
    *folders: PackageFolder,
    launch: Callable[[PackageFolder], Launch] = real_launch,
    bodies: Bodies | None = None,
) -> AsyncIterator[Host]:
    """A host that serves these packages."""
    metrics, launches = Metrics(), list[Launch]()

    def make(folder: PackageFolder, on_ready: OnReady) -> ServedModel:
        launches.append(launch(folder))
        terms = folder.package.terms
        meters = metrics.of(terms.name, str(terms.revision))
        return ServedModel(folder.package, folder.envelope, launches[-1], meters, on_ready=on_ready, first_pause=0.01)

    registry = Registry([folder.folder for folder in folders], make)
    assert await registry.reload() == []
    app = create_app(registry, metrics, bodies=bodies)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://host.test") as client:
        try:
            yield Host(registry, metrics, client, launches)
        finally:
            await registry.stop()
