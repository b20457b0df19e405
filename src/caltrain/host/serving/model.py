"""One package that is served: its enclave, its queue, its sessions. An enclave that ends unasked is started anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Literal, Protocol, TypeVar

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.boundary.messages import Attest
from caltrain.boundary.serving import (
    MAX_REQUEST_BYTES,
    CloseSession,
    Grant,
    LoadPackage,
    OpenSession,
    Served,
)
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, EnvironmentFault
from caltrain.host.serving import faults
from caltrain.host.serving.batcher import QUEUED_BATCHES, Batcher, Gone
from caltrain.host.serving.faults import Outcome
from caltrain.host.serving.metrics import ModelMeters
from caltrain.host.serving.sessions import Sessions
from caltrain.serving.package import Package
from caltrain.serving.session import REQUEST_OVERHEAD, SessionRequest

Phase = Literal["starting", "waiting-for-key", "ready", "draining", "stopped"]
ANSWER_SECONDS = 60.0
IDLE_SECONDS, DRAIN_SECONDS = 30.0, 600.0
LONGEST_PAUSE = 30.0
_BODY_BYTES = 64 << 10
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Enclave(Protocol):
    """A running enclave: see `serving.enclave.ServingEnclave`."""

    def ask(self, message: LoadPackage | Attest | Grant | OpenSession | CloseSession) -> Future[Served]:
        """Its answer to anything but a batch."""

    def infer(self, requests: list[bytes]) -> Future[list[Outcome]]:
        """An outcome for each request."""

    def stop(self) -> None:
        """End it. Waits."""


class Launch(Protocol):
    """Starts enclaves of one package."""

    def __call__(self, on_lost: Callable[[], None]) -> Enclave:
        """One that has its package. It calls `on_lost` once when it has ended. Waits; raises CaltrainError."""

    def close(self) -> None:
        """No more enclaves will be started."""


class ServedModel:
    """A package in service. Used in one event loop."""

    slots = 2

    def __init__(
        self,
        package: Package,
        envelope: Envelope,
        launch: Launch,
        meters: ModelMeters,
        *,
        on_ready: Callable[[ServedModel], None] = lambda _: None,
        first_pause: float = 1.0,
    ) -> None:
        self.package, self.envelope = package, envelope
        self.phase: Phase = "starting"
        self.name, self.version, self.most_rows = package.terms.name, package.terms.revision, package.terms.batch.rows
        self.row_bytes, self.meters = package.row_bytes, meters
        self._launch, self._on_ready, self._first_pause = launch, on_ready, first_pause
        self._loop = asyncio.get_running_loop()
        self.sessions = Sessions(self._loop.time)
        self.batcher = Batcher(self, delay_ms=package.terms.batch.delay_ms, on_batch=meters.batch)
        self._enclave: Enclave | None = None
        self._end = asyncio.Event()
        self._retirement: asyncio.Task[None] | None = None
        meters.watch(
            queue=lambda: self.batcher.rows,
            sessions=lambda: len(self.sessions),
            ready=lambda: self.phase == "ready",
        )
        self.life = self._loop.create_task(self._live())

    # -- what comes in over HTTP -----------------------------------------------------------------------------------

    async def attest(self, nonce: str) -> EvidenceBundle:
        """Evidence of the enclave. Raises EnvironmentFault `serving.*`."""
        bundle = (await self._ask(Attest("serving", nonce))).bundle
        if bundle is None:
            raise faults.restarted()
        return bundle

    async def grant(self, envelope: Envelope) -> Envelope:
        """Pass on the owner's sealed key; returns the enclave's receipt."""
        enclave = self._enclave
        receipt = (await self._ask(Grant(envelope))).signed
        if receipt is None or self._enclave is not enclave:
            raise faults.restarted()
        if self.phase == "waiting-for-key":
            self.phase = "ready"
            self._on_ready(self)
        return receipt

    async def open_session(self, request: SessionRequest) -> bytes:
        """Pass on a user's sealed session key; returns what the enclave sealed for them."""
        self.check_open()
        enclave = self._enclave
        served = await self._ask(OpenSession(request.envelope, request.credential))
        if not served.session or self._enclave is not enclave:
            raise faults.restarted()
        for idle in self.sessions.opened(served.session, request.envelope.signer):
            self._close(idle)
        return served.sealed

    async def infer(self, frame: bytes, session: str, *, gone: Gone | None = None) -> bytes:
        """The sealed answer to a sealed request of a session. Raises its error."""
        self.check_open(session)
        share = max(1, QUEUED_BATCHES // 2) * self.most_rows
        with self.sessions.request(session, self.rows_of(frame), most_rows=share):
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    return await self.batcher.submit(frame, gone=gone)
            except TimeoutError:
                raise faults.too_slow(ANSWER_SECONDS) from None
            except CaltrainError as error:
                if error.code == "session.unknown":
                    self.sessions.forget(session)
                raise

    def check_open(self, session: str | None = None) -> None:
        """Raise EnvironmentFault `serving.*` unless a new session is taken, or a request of that open one."""
        known = session is not None and session in self.sessions
        absent: dict[Phase, Callable[[], EnvironmentFault]] = {
            "starting": faults.starting,
            "waiting-for-key": faults.no_key,
            "draining": faults.draining,
            "stopped": faults.draining,
        }
        if self.phase in absent and not (self.phase == "draining" and known):
            raise absent[self.phase]()

    # -- the runner of its queue -----------------------------------------------------------------------------------

    async def run(self, batch: list[bytes]) -> list[Outcome]:
        """Have a batch computed by the enclave."""
        return await asyncio.wrap_future(self._present().infer(batch))

    def rows_of(self, frame: bytes) -> int:
        """Records of a request, by its size. Raises DataError `request.rows`."""
        rows, rest = divmod(len(frame) - REQUEST_OVERHEAD, self.row_bytes)
        if rest or not 1 <= rows <= self.most_rows or len(frame) > MAX_REQUEST_BYTES:
            raise faults.bad_rows(
                f"a request of {len(frame)} bytes, which is not 1 to {self.most_rows} sealed records of "
                f"{self.row_bytes} bytes"
            )
        return rows

    # -- life ------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new sessions; stop once the open ones are idle for 30 seconds, or after 10 minutes."""
        if self.phase in {"starting", "waiting-for-key"}:
            self._end.set()
        elif self.phase == "ready":
            self.phase = "draining"
            self._retirement = self._loop.create_task(self._retire())

    async def stop(self) -> None:
        """End its enclave. What waits fails with `serving.draining`."""
        self._end.set()
        await self.life

    @property
    def limit(self) -> int:
        """The most bytes that the body of a request may have."""
        return self.most_rows * self.row_bytes + _BODY_BYTES

    async def _retire(self) -> None:
        deadline = self._loop.time() + DRAIN_SECONDS
        while (left := min(self.sessions.last_used + IDLE_SECONDS, deadline) - self._loop.time()) > 0:
            await within(self._end.wait(), left)
            if self._end.is_set():
                return
        self._end.set()

    async def _live(self) -> None:
        pause = self._first_pause
        while not self._end.is_set():
            begun = self._loop.time()
            await self._one_life()
            if self._end.is_set() or self.phase == "draining":
                break
            self.meters.restarted()
            pause = self._first_pause if self._loop.time() - begun > 2 * LONGEST_PAUSE else pause
            await within(self._end.wait(), pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self.phase = "stopped"
        self._end.set()
        self.batcher.fail(faults.draining())
        await asyncio.to_thread(self._launch.close)
        self.meters.forget()

    async def _one_life(self) -> None:
        """An enclave from its start to its end."""
        lost = asyncio.Event()

        def on_lost() -> None:
            with suppress(RuntimeError):  # the loop has ended before the enclave
                self._loop.call_soon_threadsafe(lost.set)

        try:
            enclave = await asyncio.to_thread(self._launch, on_lost)
        except Exception as error:  # noqa: BLE001  # whatever the machine or a wheel raises: it is tried again
            _log.warning("the enclave of %s %s did not start: %s", self.name, self.version, error)
            return
        self._enclave, self.phase = enclave, "waiting-for-key"
        _log.info("the enclave of %s %s waits for its owner's key", self.name, self.version)
        await self._until_lost(lost)
        await asyncio.to_thread(enclave.stop)

    async def _until_lost(self, lost: asyncio.Event) -> None:
        ended, stopped = self._loop.create_task(lost.wait()), self._loop.create_task(self._end.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        stopped.cancel()
        self._enclave = None
        if self.phase != "draining":
            self.phase = "starting"
        self.sessions.forget()
        self.batcher.fail(faults.draining() if self._end.is_set() else faults.restarted())

    async def _ask(self, message: Attest | Grant | OpenSession | CloseSession) -> Served:
        asked = asyncio.wrap_future(self._present().ask(message))
        try:
            return await asyncio.wait_for(asked, ANSWER_SECONDS)
        except TimeoutError:
            raise faults.too_slow(ANSWER_SECONDS) from None

    def _close(self, session: str) -> None:
        if self._enclave is not None:
            self._enclave.ask(CloseSession(session))

    def _present(self) -> Enclave:
        if self._enclave is None:
            raise faults.draining() if self._end.is_set() else faults.starting()
        return self._enclave


async def within(waiting: Awaitable[object], seconds: float) -> None:
    """Wait for it, but no longer than that."""
    with suppress(TimeoutError):
        await asyncio.wait_for(waiting, seconds)
