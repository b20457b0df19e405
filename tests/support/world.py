"""A whole run in one process: enclave, host, parties and users, so that an attack is an edit to an object.

    world = World(head=2)              # ternary; two-way with head=0
    world.run_to(State.AGREED)         # honestly
    world.host.storage[name][17] ^= 1  # the attack
    world.refused(world.ingest(), "sealed.not-authentic")

`refused` proves more than the code: see there.
"""

from __future__ import annotations

import base64
import copy
import itertools
import os
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from caltrain.attestation.evidence import EvidenceBundle, Purpose
from caltrain.attestation.simulated import SimulatedAttester
from caltrain.boundary import messages as m
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.enclave.door import Door
from caltrain.enclave.run import Course, Run, State
from caltrain.enclave.session import handle
from caltrain.enclave.vault import Vault
from caltrain.host.center import Center
from caltrain.host.kept import center_object
from caltrain.models.network import Network
from caltrain.models.weights import decode_state
from caltrain.plan import Plan, Right, RunManifest, check_plan
from caltrain.provenance.chain import Chain, Event, verify_chain
from caltrain.provenance.statements import AssessedModel, ExposureVote
from caltrain.records.commitment import RecordRef
from caltrain.records.schema import decode_record
from caltrain.training.plain import OnStep, train_plain
from caltrain.training.seeds import RunSeeds
from support.fitted_once import fit_once
from support.members import Asked, Member, Pixels, question
from support.memory_host import MemoryHost
from support.tiny import CLASSES, MEASUREMENT, MODEL, PARTIES, RIGHTS, SHAPE, Element, pictures, tiny_plan

__all__ = ["CLASSES", "MEASUREMENT", "MODEL", "PARTIES", "SHAPE", "World", "pictures"]
HARMLESS = {State.NEW, State.ENROLLING, State.RESUMING, State.AGREEING, State.ASSESSING, State.LINKED}
Change = Callable[[Plan], Plan]
fit_once()


def _quiet(_epoch: int, _step: int, _loss: float) -> None:
    pass


class World:
    """Three parties with two shards each, users `una` (all rights) and `pat` (predict only), a tiny model.

    The first `held_out` of the parties hold out their last shard.
    """

    def __init__(
        self,
        *,
        head: int = 2,
        dtype: Element = "u8",
        records: int = 9,
        epochs: int = 2,
        budget: int = 20,
        reveal_seed: bool = True,
        held_out: int = 0,
        change: Change = lambda plan: plan,
    ) -> None:
        self.parties = {name: Member(name) for name in PARTIES}
        self.users = {name: Member(name) for name in RIGHTS}
        plan = tiny_plan(
            self.parties.values(),
            self.users.values(),
            head=head,
            dtype=dtype,
            epochs=epochs,
            budget=budget,
            reveal=reveal_seed,
        )
        self.plan = check_plan(change(plan))
        for seed, party in enumerate(self.parties.values()):
            labels = [int(label) for label in np.random.default_rng(seed).integers(0, len(CLASSES), records)]
            images = pictures(records, seed=seed, dtype=self.plan.data.dtype)
            party.seal(self.plan.data, images, labels, shard_records=5)
            if seed < held_out:
                party.shards[-1].listed["held_out"] = True
        self.root = SigningKey()
        self.host = MemoryHost()
        self.run = self._new_run()
        self.events: list[Envelope] = []
        self.released: dict[str, bytes] = {}
        self.statements: dict[str, Envelope] = {}
        self.suspicion: dict[str, bytes] = {}
        self.semi_trained: dict[str, bytes] = {}
        self.wants: dict[tuple[str, int], int] = {}
        self.left_out: set[RecordRef] = set()

    def _new_run(self) -> Run:
        vault = Vault(SimulatedAttester(self.root, measurement=MEASUREMENT))
        vault.randomness = bytes(32)  # keys differ each time, the run seed does not
        chain = Chain(vault.signing, run=vault.run)
        return Run(vault=vault, door=Door(self.host.enclave_channel), chain=chain)

    # -- requests ----------------------------------------------------------------------------------------------------

    def send(self, request: m.Request) -> m.Reply:
        """One request, as the host sends it; its events are kept."""
        reply = handle(self.run, request)
        if isinstance(reply, m.Done | m.Failed):
            self.events += reply.events
        self.host.storage["chain.jsonl"] = bytearray(b"".join(msgspec.json.encode(e) + b"\n" for e in self.events))
        return reply

    def done(self, request: m.Request) -> m.Done:
        """A request that must succeed."""
        reply = self.send(request)
        assert isinstance(reply, m.Done), reply
        return reply

    def refused(self, request: m.Request, code: str, *, fatal: bool | None = None) -> dict[str, str]:
        """A request that must fail with `code`. Returns the error's fields.

        Before the run began and after it ended nothing that the enclave holds has changed, and it read at most;
        in between the enclave has stopped for good, and after the last thing that went in it told its progress at most.
        """
        fatal = self.run.state not in HARMLESS if fatal is None else fatal
        self.host.serve()  # what is still on its way from before
        before, head, crossed = self._held(), self.run.chain.head, len(self.host.log)
        state = self.run.state
        reply = self.send(request)
        assert isinstance(reply, m.Failed), reply
        assert (reply.error["code"], reply.fatal) == (code, fatal)
        if fatal:
            assert self.run.state is State.STOPPED
            assert [e.kind for e in self.chain()[-1:]] == ["stopped"]
            after = itertools.takewhile(lambda c: c.way == "out", reversed(self.host.log[crossed:]))
            left = [c.message for c in after] + self.host.unread()
            assert all(isinstance(message, m.Progress) for message in left), left
            again = handle(self.run, request)
            assert isinstance(again, m.Failed)
            assert again.error["code"] == "session.not-now"
        else:
            assert self.run.chain.head == head
            assert self.run.state is state
            assert self._held() == before
            asked = [c.message for c in self.host.log[crossed:] if c.way == "out"] + self.host.unread()
            assert all(isinstance(message, m.Read) for message in asked), asked
        return reply.error

    def _held(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self.run).items() if name not in {"pending", "state"}}
        by_value = (bool, int, str, bytes, set, dict)
        held = {n: copy.copy(value) if isinstance(value, by_value) else id(value) for n, value in fields.items()}
        words = dict(self.run.resuming.words) if self.run.resuming else {}
        votes = dict(self.run.assessment.votes) if self.run.assessment else {}
        return held | {
            "parties": dict(self.run.vault.parties),
            "run": self.run.vault.run,
            "words": words,
            "votes": votes,
        }

    # -- the honest run ----------------------------------------------------------------------------------------------

    def run_to(self, state: State) -> World:
        """Advance honestly until the run is in `state`."""
        steps: dict[State, Callable[[], object]] = {
            State.NEW: lambda: self.done(self.configure()),
            State.ENROLLING: self.enrol,
            State.AGREEING: self.agree,
            State.AGREED: self.take_in,
            State.READY: self.train,
            State.TRAINED: self.hunt,
            State.HUNTED: self.release,
            State.RELEASED: self.link,
        }
        for _ in range(20):
            if self.run.state is state:
                return self
            steps[self.run.state]()
        raise AssertionError(f"the run is still {self.run.state}")

    def configure(self) -> m.Configure:
        """The plan with every approval."""
        return m.Configure(canonical_json(self.plan), {p.name: p.approve(self.plan) for p in self.parties.values()})

    def attest(self, purpose: Purpose = "training", *, nonce: str | None = None) -> EvidenceBundle:
        """Evidence for a fresh nonce."""
        bundle = self.done(m.Attest(purpose, nonce or os.urandom(32).hex())).bundle
        assert bundle is not None
        return bundle

    def provision(self, name: str) -> m.Provision:
        """What `name` provisions."""
        return m.Provision(name, self.parties[name].provision(self.attest().binding))

    def enrol(self) -> None:
        """All parties hand over their keys; the enclave signs the manifest."""
        for name in self.parties:
            self.done(self.provision(name))
        self.done(m.MakeManifest())

    def agree(self) -> None:
        """All parties countersign."""
        for party in self.parties.values():
            self.done(m.Countersign(party.name, party.countersign(self.manifest)))

    def upload(self) -> None:
        """All parties' shards into the host's storage, unless it has something by that name."""
        for party in self.parties.values():
            for shard in party.shards:
                self.host.storage.setdefault(f"shards/{party.name}/{shard.entry.shard}", bytearray(shard.raw))

    def ingest(self) -> m.Ingest:
        """The demand to ingest what the host has."""
        self.upload()
        names = (name.split("/") for name in self.host.storage if name.startswith("shards/"))
        return m.Ingest(tuple(m.StoredShard(party, shard) for _, party, shard in names))

    def take_in(self) -> None:
        """Ingest, and start the CenterNet."""
        seed = self.done(self.ingest()).center_seed
        self.host.center = Center(self.plan, seed=seed, records=self.manifest.trained(self.plan))

    def train(self) -> m.Done:
        """On to the next checkpoint, deepening the cut where the plan says so, its policy or the parties."""
        course = self.course
        due = self.plan.partition.front_at(course.epoch)
        if self.plan.exposure and not course.step and course.epoch % self.plan.exposure.every == 0:
            due = max(due, self.assess().due or 0)
        if not course.step and due > course.front:
            self.done(m.MoveCut(due))
            self.host.the_center.recut(due, {})
        return self.done(m.Train(course.epoch, course.step))

    def assess(self) -> m.Done:
        """What is due before an epoch; where the parties vote, each for what `wants` gives by epoch (default: this)."""
        done = self.done(m.Assess())
        assert done.signed is not None
        self.statements["assessed-model"], self.semi_trained = done.signed, done.sealed
        for name in self.parties if self.run.state is State.ASSESSING else ():
            done = self.done(self.vote(name))
        return done

    def vote(self, name: str, **changes: Any) -> m.Vote:
        """A party's vote, on what the enclave signed last."""
        signed = self.statement("assessed-model", AssessedModel)
        wanted = {
            "run": signed.run,
            "epoch": signed.epoch,
            "model": signed.model,
            "party": name,
            "front": self.wants.get((name, signed.epoch), signed.front),
            "report": digest("test/v1"),
        } | changes
        return m.Vote(name, self.parties[name].signer.sign("exposure-vote", ExposureVote(**wanted)))

    @property
    def course(self) -> Course:
        """Where training is."""
        assert self.run.course is not None
        return self.run.course

    def hunt(self) -> None:
        """Hunt before the release."""
        self.suspicion = self.done(m.Hunt()).sealed

    def release(self) -> None:
        """Release to the parties."""
        reply = self.done(self.release_request())
        assert reply.signed is not None
        self.released, self.statements["model"] = reply.sealed, reply.signed

    def release_request(self) -> m.Release:
        """The CenterNet is stored; the demand to release."""
        self.host.storage["center"] = bytearray(self.host.the_center.weights())
        return m.Release()

    def link(self) -> None:
        """Link the model."""
        reply = self.done(m.Link())
        assert reply.signed is not None
        self.statements["linked-model"] = reply.signed

    # -- questions ---------------------------------------------------------------------------------------------------

    def question(self, kind: Right, inputs: Pixels, *, user: str = "una", **changes: Any) -> Asked:
        """A user's question, sealed for fresh evidence."""
        return question(self.users[user], self.attest("query"), kind=kind, inputs=inputs, **changes)

    # -- after a crash -----------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Enclave and center are gone; a new enclave begins, the host's storage stays."""
        self.host.reconnect()
        self.run, self.host.center = self._new_run(), None

    def resume(self, name: str | None = None) -> m.Resume:
        """The demand to take up the run from a checkpoint: the newest one, unless named."""
        return m.Resume(canonical_json(self.plan), name or self.newest_checkpoint())

    def newest_checkpoint(self) -> str:
        """The object that the chain's last checkpoint event names."""
        named = [event.body for event in self.chain_of_host() if event.kind == "checkpoint"][-1]
        return next(
            name
            for name, raw in self.host.storage.items()
            if name.startswith("checkpoint-")
            and digest("checkpoint/v1", bytes(raw[: named["size"]])) == named["sealed"]
        )

    def rejoin(self, name: str, *, head: str | None = None, **changes: Any) -> m.Rejoin:
        """A party's word for the head of the chain that the host has."""
        binding = self.attest("resume").binding
        run = {"run": self.chain_of_host()[-1].run} | changes
        return m.Rejoin(name, self.parties[name].rejoin(binding, head=head or self.host_head, **run))

    @property
    def host_head(self) -> str:
        """The head of the chain that the host has."""
        return self.chain_of_host()[-1].digest()

    def chain_of_host(self) -> list[Event]:
        """The chain that the host has, unverified."""
        return [json_decoder(Event).decode(base64.b64decode(envelope.payload)) for envelope in self.events]

    def take_up(self, *names: str) -> m.Done:
        """A restart with the word of these parties (default: all); the CenterNet goes on from its kept state."""
        self.restart()
        self.done(self.resume())
        for name in names or self.parties:
            done = self.done(self.rejoin(name))
        self.center_after(done)
        return done

    def center_after(self, done: m.Done) -> None:
        """The CenterNet of the place where the run was taken up."""
        if done.at is not None:
            records = self.manifest.trained(self.plan)
            center = Center(self.plan, seed=done.center_seed, records=records, front=done.front)
            kept = self.host.storage.get(center_object(*done.at))
            if kept is not None:
                center.restore(decode_state(bytes(kept), step="resume"))
            self.host.center = center

    # -- what is true ------------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> RunManifest:
        """The run manifest."""
        assert self.run.manifest is not None
        return self.run.manifest

    def chain(self) -> tuple[Event, ...]:
        """All events, verified up to the enclave's own head."""
        signing = self.run.vault.signing.public
        return verify_chain(self.events, run=self.run.vault.run, signing_key=signing, head=self.run.chain.head)

    def statement(self, kind: str, type_: type[Any]) -> Any:
        """A statement of the enclave, verified."""
        return open_envelope(self.statements[kind], kind, self.run.vault.signing.public, type_, step="verify")

    def linked(self) -> dict[RecordRef, tuple[int, bytes, Tensor]]:
        """What the enclave has linked its model to: by record label, commitment, and the fingerprint as stored."""
        store, model = self.run.linkage, self.run.model_digest
        assert store is not None
        return {r: (label, h, f) for label in store.labels(model) for r, h, f in store.entries(model, label)}

    def data(self, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Those trained on (without `left_out`) or held out, as in the manifest: pixels (N, 1, 4, 4), labels (N,)."""
        shards = [shard for p in self.parties.values() for shard in p.shards if shard.entry.held_out == held_out]
        records = [
            record
            for shard in shards
            for leaf, record in enumerate(shard.records)
            if RecordRef(shard.header.contributor, shard.header.shard, leaf) not in self.left_out
        ]
        decoded = [decode_record(self.plan.data, record) for record in records]
        pixels = torch.from_numpy(np.stack([array for array, _ in decoded]))
        return pixels, torch.tensor([label for _, label in decoded])

    def plain(
        self, seed: bytes, *, cuts: dict[int, int] | None = None, epochs: int | None = None, on_step: OnStep = _quiet
    ) -> Network:
        """The model of the plain loop over the same records and run seed."""
        pixels, labels = self.data()
        plan, seeds = self.plan, RunSeeds.from_run_seed(seed)
        training = msgspec.structs.replace(plan.training, epochs=epochs or plan.training.epochs)
        return train_plain(
            plan.model,
            plan.partition,
            plan.data,
            training,
            pixels=pixels,
            labels=labels,
            seeds=seeds,
            cuts=cuts,
            on_step=on_step,
        )
