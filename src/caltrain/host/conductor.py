"""The run as the host sees it: waits for the parties, then asks the enclave for each phase in turn.

The host decides nothing that matters: the enclave refuses what is out of order, and what it has not been given.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import msgspec

from caltrain.attestation.evidence import EvidenceBundle, Purpose
from caltrain.boundary import messages as m
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, ProtocolError, from_wire
from caltrain.host.cuts import AskedCut
from caltrain.host.kept import kept_events, last_cut, newest_checkpoint
from caltrain.host.runlog import RunLog
from caltrain.host.sizes import slot_bytes
from caltrain.host.store import Store
from caltrain.plan import Plan, RunManifest, check_approval, check_countersignature

if TYPE_CHECKING:
    from caltrain.host.center import Center
    from caltrain.host.device import Choice
    from caltrain.host.launcher import Enclave

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
    held_out: m.Measured | None = None
    images_per_second: float | None = None
    simulated: bool = True
    waiting_for: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    sandbox: dict[str, str] = field(default_factory=dict)
    audit_rate: float = 0.0
    cut: int | None = None
    error: dict[str, str] | None = None


class Conductor:
    """Owns the enclave of one run."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        *,
        root_secret: bytes,
        auto_start: bool,
        resume: bool = False,
        device: Choice = "auto",
    ) -> None:
        self.plan, self.store, self.center = plan, store, cast("Center | None", None)
        self.status = Status(epochs=plan.training.epochs, audit_rate=plan.center.audit_rate)
        self.approvals: dict[str, Envelope] = {}
        self.provisioned: set[str] = set()
        self.countersigned: set[str] = set()
        self.manifest: RunManifest | None = None
        self._root_secret = root_secret
        self._enclave: Enclave | None = None
        self._changed = threading.Condition()
        self._started, self._resume, self._device = auto_start or resume, resume, device
        self._asked = AskedCut(plan)
        self.rejoined: set[str] = set()
        self._due: dict[str, int | None] = {}
        """By party that has voted: the layers that are due, known with the last vote."""
        self._stopping = False
        self._epoch_began, self._step_began = 0.0, 0
        self._taken_up: m.Done | None = None
        self._log = RunLog(store)
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

    def rejoin(self, party: str, envelope: Envelope) -> None:
        """A party's word that the run may be taken up."""
        if party in self.rejoined:  # sent twice: once is enough for one restart
            return
        done = self._ask(m.Rejoin(party, envelope))
        if done.state:  # first: the thread that waits ends its wait once all have rejoined
            self._taken_up = done
        self.rejoined.add(party)
        self.notify()

    def ask_cut(self, front: int) -> None:
        """The operator's wish for a FrontNet of so many layers from the next epoch on."""
        self._asked.ask(front, epoch=max(self.status.epoch, 1))
        self.status.cut = front
        self.notify()

    def agree_cut(self, party: str, envelope: Envelope) -> None:
        """A party's word for a shallower FrontNet."""
        if self.manifest is None or self.status.phase != "cut":
            raise _not_yet("cut to agree to")
        head = kept_events(self.store)[-1].digest()
        self._asked.agree(party, envelope, run=self.manifest.run, head=head)
        self.notify()

    def vote(self, party: str, envelope: Envelope) -> None:
        """A party's vote on the cut of the coming epoch."""
        if party in self._due:  # sent twice: once is enough for one epoch
            return
        due = self._ask(m.Vote(party, envelope)).due
        with self._changed:  # whoever looks once this is answered sees that nothing more is asked of the party
            self._due[party] = due
            self.status.waiting_for = [name for name in self.status.waiting_for if name != party]
            self._changed.notify_all()

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
            if self._resume:
                done = self._take_up()
            else:
                self._enrol()
                done = m.Done(state="agreed")
            if done.state == "agreed":
                done = self._ingest()
            self._train(done)
            self._release()
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
                slot_bytes=slot_bytes(self.plan),
                threads=self.plan.training.threads,
                root_secret=self._root_secret,
                wheel=self.store.read_whole("wheel") if self.plan.model.wheel else b"",
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

    def _take_up(self) -> m.Done:
        """Go on with the run whose checkpoint and chain lie in the folder, once a quorum of parties agrees."""
        manifest = self.store.read_whole("manifest.json")
        self.manifest = json_decoder(RunManifest).decode(_payload(json_decoder(Envelope).decode(manifest)))
        self._ask(m.Resume(canonical_json(self.plan), newest_checkpoint(self.store)))
        names = {party.name for party in self.plan.parties}
        self._wait("resume", lambda: set() if self._taken_up else names - self.rejoined)
        done = self._taken_up
        if done is None:
            raise ProtocolError(
                "resume.no-quorum",
                "all parties have rejoined, and too few of them signed one head of the chain",
                step="resume",
                fix="Restart the host once every party has read the run's chain to its end.",
            )
        moved = last_cut(self.store)
        if moved > done.front:  # it was deepened after that checkpoint, and must be again
            self._asked.front = moved
        return done

    def _ingest(self) -> m.Done:
        parties = self.manifest.parties if self.manifest else ()
        wanted = {m.StoredShard(p.name, s.shard) for p in parties for s in p.shards}
        self._wait("shards", lambda: {s.party for s in wanted - set(self.store.shards())})
        self._wait("start", lambda: set() if self._started else {"operator"})
        self._phase("ingest")
        done = self._ask(m.Ingest(self.store.shards()), wait=_FOREVER)
        self.status.ignored = [f"{s.party}/{s.shard}" for s in done.ignored]
        return done

    def _train(self, done: m.Done) -> None:
        """From where the enclave says that the run is to the end of training."""
        from caltrain.host.begin import begin_center  # noqa: PLC0415  # as in _launch

        records = self.manifest.trained(self.plan) if self.manifest else 0
        center = begin_center(self.plan, self.store, done, records=records, device=self._device)
        self._running().center = self.center = center
        self._phase("train")
        while done.state != "trained":
            done = self._move_cut(done, least=self._assess(done))
            epoch, step = done.at or (0, 0)
            self.status.epoch, self._epoch_began, self._step_began = epoch + 1, time.monotonic(), step
            done = self._ask(m.Train(epoch, step), wait=_FOREVER)
            self.status.loss, self.status.held_out = done.loss, done.held_out
            if done.at is None or done.at[1] == 0:
                self._log.epoch(epoch=epoch + 1, loss=done.loss, held_out=done.held_out)

    def _assess(self, done: m.Done) -> int:
        """Where the plan has a policy for the cut: layers that the coming epoch needs in the FrontNet; else 0."""
        (epoch, step), spec = done.at or (0, 0), self.plan.exposure
        if spec is None or step or epoch % spec.every or self.center is None:
            return 0
        self.store.put("center", self.center.weights())
        self._due.clear()
        judged = self._ask(m.Assess(), wait=_FOREVER)
        self._keep("semi-trained", judged)
        if judged.due is not None:
            return judged.due
        names = {party.name for party in self.plan.parties}
        self._wait("assess", lambda: names - self._due.keys())
        self._phase("train")
        return max(due or 0 for due in self._due.values())

    def _move_cut(self, done: m.Done, *, least: int) -> m.Done:
        """Move the cut between epochs: where the plan's schedule says so, its policy, or the operator."""
        epoch, step = done.at or (0, 0)
        if step or self.center is None:
            return done
        asked = self._asked.front if epoch else None
        front = max(self.plan.partition.front_at(epoch), least, done.front if asked is None else asked)
        if front < done.front:
            self._wait("cut", lambda: self._asked.missing(done.front))
            self._phase("train")
            if self._asked.front != asked:  # the operator has thought again
                return self._move_cut(done, least=least)
        if front != done.front:
            former, done = done.front, self._ask(m.MoveCut(front, self._asked.approvals), wait=_FOREVER)
            from caltrain.host.begin import moved_out  # noqa: PLC0415  # as in _launch

            self.center.recut(front, moved_out(self.store) if front < former else {})
        if asked is not None:
            self._asked.done()
            self.status.cut = None
        return done

    def _release(self) -> None:
        self._phase("hunt")
        self._keep("suspicion", self._ask(m.Hunt(), wait=_FOREVER))
        self._phase("release")
        if self.center is not None:
            self.store.put("center", self.center.weights())
        self._keep("release", self._ask(m.Release(), wait=_FOREVER))
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
        self.store.sync()  # a checkpoint that an event names must outlast a power failure if the event does
        while self._events:
            self.store.append_line("chain.jsonl", msgspec.json.encode(self._events[0]), durable=True)
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
            speed = (progress.done - self._step_began) * self.plan.training.batch / max(seconds, 1e-9)
            status.images_per_second, epoch = speed, status.epoch
            self._log.step(
                epoch=epoch, step=progress.done, steps=progress.total, loss=progress.loss, images_per_second=speed
            )


def _payload(envelope: Envelope) -> bytes:
    return base64.b64decode(envelope.payload)


def _not_yet(what: str) -> ProtocolError:
    return ProtocolError(
        "host.not-yet", f"the run has no {what} yet", step="host", fix="Wait until the run has come that far."
    )
