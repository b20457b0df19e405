"""The run as the host sees it: waits for the parties, then asks the enclave for each phase in turn.

The host decides nothing that matters: the enclave refuses what is out of order, and what it has not been given.
"""

from __future__ import annotations

import base64
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from caltrain.attestation.evidence import EvidenceBundle, Purpose
from caltrain.boundary import messages as m
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, ProtocolError, from_wire
from caltrain.host.store import Store
from caltrain.models.spec import layer_shapes
from caltrain.plan import Plan, RunManifest, check_approval, check_countersignature

if TYPE_CHECKING:
    from caltrain.host.launcher import Enclave

_ALIGN = 4096
_FOREVER = 1e6  # seconds; a phase of the run waits for a query to end, however long


@dataclass
class Status:
    """What anybody may know of a run."""

    phase: str = "starting"
    done: int = 0
    total: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    images_per_second: float | None = None
    simulated: bool = True
    waiting_for: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    sandbox: dict[str, str] = field(default_factory=dict)
    error: dict[str, str] | None = None


class Conductor:
    """Owns the enclave of one run."""

    def __init__(self, plan: Plan, store: Store, *, root_secret: bytes, auto_start: bool) -> None:
        self.plan, self.store = plan, store
        self.status = Status(epochs=plan.training.epochs)
        self.approvals: dict[str, Envelope] = {}
        self.provisioned: set[str] = set()
        self.countersigned: set[str] = set()
        self.manifest: RunManifest | None = None
        self._root_secret = root_secret
        self._enclave: Enclave | None = None
        self._changed = threading.Condition()
        self._started = auto_start
        self._stopping = False
        self._epoch_began = 0.0
        self._events: deque[Envelope] = deque()
        self._thread = threading.Thread(target=self._conduct, name="conductor", daemon=True)

    # -- life ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Launch the enclave and conduct the run in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the enclave and the thread."""
        self._stopping = True
        self.notify()
        if self._enclave is not None:
            self._enclave.stop()
        if self._thread.ident is not None:
            self._thread.join(timeout=30)

    def notify(self) -> None:
        """Something came in: look again."""
        with self._changed:
            self._changed.notify_all()

    def start_training(self) -> None:
        """The operator's word that training may begin once everything is in."""
        self._started = True
        self.notify()

    # -- what comes in over HTTP ---------------------------------------------------------------------------------

    def approve(self, party: str, envelope: Envelope) -> None:
        """A party's approval of the plan. Raises unless it is one."""
        check_approval(self.plan, party, envelope)
        self.approvals[party] = envelope
        self.notify()

    def attest(self, purpose: Purpose, nonce: str) -> EvidenceBundle:
        """Evidence from the enclave."""
        bundle = self._ask(m.Attest(purpose, nonce)).bundle
        if bundle is None:
            raise _not_yet("evidence")
        return bundle

    def provision(self, party: str, envelope: Envelope) -> Envelope:
        """Pass on what a party sealed to the enclave; returns the enclave's receipt."""
        receipt = self._ask(m.Provision(party, envelope)).signed
        if receipt is None:
            raise _not_yet("receipt")
        self.provisioned.add(party)
        self.notify()
        return receipt

    def countersign(self, party: str, envelope: Envelope) -> None:
        """A party's signature over the manifest."""
        if self.manifest is None:
            raise _not_yet("manifest")
        check_countersignature(self.plan, self.manifest, party, envelope)
        # Kept first: the enclave takes a signature once, and one that cannot be kept must be sent again.
        self.store.put(f"countersignatures/{party}.json", msgspec.json.encode(envelope))
        self._ask(m.Countersign(party, envelope))
        self.countersigned.add(party)
        self.notify()

    def query(self, user: str, envelope: Envelope) -> bytes:
        """A model user's sealed question; returns the sealed answer."""
        return self._ask(m.Query(user, envelope)).sealed[user]

    def disclose(self, party: str, envelope: Envelope) -> None:
        """A party's note that it disclosed a record."""
        self._ask(m.RecordDisclosure(party, envelope))

    # -- the run -------------------------------------------------------------------------------------------------

    def _conduct(self) -> None:
        try:
            self._launch()
            self._enrol()
            self._ingest_and_train()
            self._phase("linked")
            self._wait("linked", lambda: {"model users"})
        except CaltrainError as error:
            self._fail(error.diagnostics())
        except Exception as error:  # noqa: BLE001  # the thread's last line: whatever ended the run must be seen
            self._fail(
                ProtocolError(
                    "host.internal",
                    f"the host failed unexpectedly: {type(error).__name__}: {error}",
                    step=self.status.phase,
                    fix="Report this with the host's log.",
                ).diagnostics()
            )
        finally:
            if self._enclave is not None:
                self._enclave.stop()  # whatever ended the run: what the enclave holds ends with it

    def _fail(self, diagnostics: dict[str, str]) -> None:
        if not self._stopping:
            self.status.error = diagnostics
            self.status.phase = "failed"

    def _launch(self) -> None:
        # Imported here: the HTTP server must be up and answering before torch is loaded.
        from caltrain.host.launcher import launch  # noqa: PLC0415

        self.store.put("plan.json", canonical_json(self.plan))
        log = os.open(self.store.path("enclave.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._enclave = launch(
                self.store,
                slot_bytes=_slot_bytes(self.plan),
                threads=self.plan.training.threads,
                root_secret=self._root_secret,
                on_progress=self._on_progress,
                on_events=self._keep_events,
                log=log,
            )
        finally:
            os.close(log)
        self.status.simulated = self._enclave.ready.simulated
        self.status.sandbox = self._enclave.ready.sandbox

    def _enrol(self) -> None:
        names = {party.name for party in self.plan.parties}
        self._wait("approvals", lambda: names - self.approvals.keys())
        self._ask(m.Configure(canonical_json(self.plan), self.approvals))
        self._wait("provisioning", lambda: names - self.provisioned)
        signed = self._ask(m.MakeManifest()).signed
        if signed is None:
            raise _not_yet("manifest")
        self.store.put("manifest.json", msgspec.json.encode(signed))
        self.manifest = json_decoder(RunManifest).decode(_payload(signed))
        self._wait("countersignatures", lambda: names - self.countersigned)
        wanted = {m.StoredShard(p.name, s.shard) for p in self.manifest.parties for s in p.shards}
        self._wait("shards", lambda: {s.party for s in wanted - set(self.store.shards())})
        self._wait("start", lambda: set() if self._started else {"operator"})

    def _ingest_and_train(self) -> None:
        from caltrain.host.center import Center  # noqa: PLC0415  # as in _launch

        enclave = self._running()
        self._phase("ingest")
        done = self._ask(m.Ingest(self.store.shards()), wait=_FOREVER)
        self.status.ignored = [f"{s.party}/{s.shard}" for s in done.ignored]
        records = self.manifest.records() if self.manifest else 0
        center = Center(self.plan, seed=done.center_seed, records=records)
        enclave.center = center
        for epoch in range(self.plan.training.epochs):
            self._phase("train")
            self.status.epoch, self._epoch_began = epoch + 1, time.monotonic()
            self.status.loss = self._ask(m.TrainEpoch(epoch), wait=_FOREVER).loss
        self._phase("release")
        weights = center.weights()
        self.store.put("center", weights)
        done = self._ask(m.Release(len(weights)), wait=_FOREVER)
        self._keep("release", done)
        self._phase("link")
        self._keep("suspicion", self._ask(m.Link(), wait=_FOREVER))

    def _keep(self, what: str, done: m.Done) -> None:
        for party, sealed in done.sealed.items():
            self.store.put(f"{what}/{party}", sealed)
        if done.signed is not None:
            self.store.put(f"{what}.json", msgspec.json.encode(done.signed))

    def _ask(self, request: m.Request, *, wait: float | None = None) -> m.Done:
        enclave = self._running()
        return enclave.request(request) if wait is None else enclave.request(request, wait=wait)

    def _keep_events(self, events: tuple[Envelope, ...]) -> None:
        # One that could not be kept (a full disk) stays first in the queue: a chain with a hole would be worthless.
        self._events.extend(events)
        while self._events:
            self.store.append_line("chain.jsonl", msgspec.json.encode(self._events[0]))
            self._events.popleft()

    def _running(self) -> Enclave:
        if self.status.error is not None:
            raise from_wire(self.status.error)
        if self._enclave is None:
            raise _not_yet("enclave")
        return self._enclave

    def _wait(self, phase: str, missing: Callable[[], set[str]]) -> None:
        self._phase(phase)
        with self._changed:
            while gone := missing():
                if self._stopping:
                    raise _not_yet(phase)
                self._running().check_alive()
                self.status.waiting_for = sorted(gone)
                self._changed.wait(timeout=1)
        self.status.waiting_for = []

    def _phase(self, phase: str) -> None:
        self.status.phase, self.status.done, self.status.total = phase, 0, 0

    def _on_progress(self, progress: m.Progress) -> None:
        status = self.status
        status.done, status.total = progress.done, progress.total
        if progress.phase == "train":
            status.loss = progress.loss
            seconds = time.monotonic() - self._epoch_began
            status.images_per_second = progress.done * self.plan.training.batch / max(seconds, 1e-9)


def _payload(envelope: Envelope) -> bytes:
    return base64.b64decode(envelope.payload)


def _slot_bytes(plan: Plan) -> int:
    """The largest tensor that crosses, rounded up to pages."""
    shapes = layer_shapes(plan.model, plan.data.shape)
    cuts = (shapes[plan.partition.front], shapes[len(plan.model.layers) - plan.partition.head])
    largest = max(math.prod(shape) for shape in cuts) * plan.training.batch * 4
    return math.ceil(largest / _ALIGN) * _ALIGN


def _not_yet(what: str) -> ProtocolError:
    return ProtocolError(
        "host.not-yet", f"the run has no {what} yet", step="host", fix="Wait until the run has come that far."
    )
