"""What cannot be asked, shown or believed in accountability, one by one: a named error, and nothing is lost.

Each case is done to a linked run. Afterwards the same run answers an honest trace as before, and its chain and budgets
hold nothing of what was refused (but for inputs that were counted before the host's loss showed).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from caltrain.auditor.bundle import TraceBundle, read_bundle, verify_bundle
from caltrain.auditor.collect import encode_bundle
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import TraceStatement
from caltrain.client.ask import ask
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.enclave.door import Door
from caltrain.enclave.linkage import LinkageStore
from caltrain.enclave.run import State
from caltrain.enclave.segments import Place
from caltrain.errors import CaltrainError
from caltrain.participant.disclose import disclose
from caltrain.plan import Plan
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure
from support.bundles import disclosed, statement_of
from support.folders import identity_of, policy_of
from support.scripted_host import ScriptedHost
from support.world import World, pictures

INPUT = pictures(1, seed=99)
OTHER = "sha256:" + "0" * 64


def filtered(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, trace=msgspec.structs.replace(plan.trace, filters=True))


class Dispute:
    """A linked run, one trace of it as a bundle, and what a test refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(epochs=1, budget=6, change=filtered).run_to(State.LINKED)
        asked = self.world.question("trace", INPUT)
        given = asked.open(self.world.done(m.Query("una", asked.envelope)).sealed["una"])
        self.bundle = TraceBundle(
            plan=self.world.plan,
            manifest=self.world.run.vault.signing.sign("run-manifest", self.world.manifest),
            countersignatures={n: p.countersign(self.world.manifest) for n, p in self.world.parties.items()},
            linked=self.world.statements["linked-model"],
            trace=given.traces[0],
            evidence=asked.bundle,
            chain=tuple(self.world.events),
        )
        self.statement = statement_of(self.bundle)
        self.named = self.statement.neighbours[0].record

    @property
    def store(self) -> LinkageStore:
        assert self.world.run.linkage is not None
        return self.world.run.linkage

    # -- what a test does ----------------------------------------------------------------------------------------

    def query(self, inputs: Any = INPUT, **question: Any) -> None:
        """Ask the enclave, past every check of the client."""
        asked = self.world.question("trace", inputs, **question)
        reply = self.world.send(m.Query("una", asked.envelope))
        if isinstance(reply, m.Failed):
            assert not reply.fatal
            raise CaltrainError(reply.error["code"], reply.error["what"], step="test", fix="test")

    def ask(self, inputs: Any) -> None:
        """Ask as the client does."""
        host = ScriptedHost(self.world)
        try:
            with host.client() as client:
                ask(
                    client,
                    self.world.plan,
                    policy_of(self.world),
                    kind="trace",
                    user="una",
                    signer=self.world.users["una"].signer,
                    inputs=inputs,
                    clock=lambda: pytest.fail("nothing is asked"),
                )
        finally:
            assert host.requests == []  # nothing was sent

    def verify(self, *answers: Envelope, bundle: TraceBundle | None = None) -> None:
        verify_bundle(
            msgspec.structs.replace(bundle or self.bundle, disclosures=answers),
            plan_digest=self.world.plan.digest(),
            policy=policy_of(self.world),
        )

    def told(self, **changes: Any) -> Envelope:
        """A disclosure of the first record, otherwise than it should be."""
        signer = self.world.parties[self.named.party].signer
        honest = open_envelope(disclosed(self.world, self.named), "disclosure", signer.public, Disclosure, step="test")
        return signer.sign("disclosure", msgspec.structs.replace(honest, **changes))

    def cold(self, harm: Callable[[dict[str, bytearray]], object]) -> None:
        """Ask when nothing of the links is in memory and the host has done harm to what it keeps of them."""
        kept = {name: bytearray(raw) for name, raw in self.world.host.storage.items()}
        self.store.unload(self.world.run.model_digest)
        harm(self.world.host.storage)
        try:
            self.query()
        finally:
            self.world.host.storage.clear()
            self.world.host.storage.update(kept)

    def reopened(self, harm: Callable[[dict[str, bytearray]], object]) -> None:
        """Open the store again by its head after the host did harm to its headers."""
        kept = {name: bytearray(raw) for name, raw in self.world.host.storage.items()}
        harm(self.world.host.storage)
        try:
            LinkageStore.open(Door(self.world.host.enclave_channel), self.store.place, head=self.store.head)
        finally:
            self.world.host.storage.clear()
            self.world.host.storage.update(kept)

    def changed_byte(self) -> None:
        raw = bytearray(encode_bundle(self.bundle))
        raw[random.Random(3).randrange(len(raw))] ^= 1
        (self.folder / "bundle.json").write_bytes(raw)
        self.verify(bundle=read_bundle(self.folder / "bundle.json"))

    def other_salt(self) -> None:
        self.verify(self.told(salt="A" * 43 + "="))

    def other_record(self) -> None:
        named = {n.record for n in self.statement.neighbours}
        every = [
            RecordRef(name, shard.header.shard, leaf)
            for name, party in self.world.parties.items()
            for shard in party.shards
            for leaf in range(len(shard.records))
        ]
        self.verify(disclosed(self.world, next(record for record in every if record not in named)))

    def spent(self) -> None:
        self.query(np.repeat(INPUT, self.world.plan.users[0].budget, axis=0))

    def no_such_record(self) -> None:
        owner = identity_of(self.world.parties[self.named.party], self.folder / "owner")
        missing = RecordRef(self.named.party, self.named.shard, 4_000)
        disclose(owner, self.world.plan, missing, model=self.statement.model)

    def note_of_nobody(self) -> None:
        note = self.world.parties["beta"].note(run=self.world.run.vault.run, commitment=OTHER)
        reply = self.world.send(m.RecordDisclosure("beta", note))
        assert isinstance(reply, m.Failed)
        raise CaltrainError(reply.error["code"], reply.error["what"], step="test", fix="test")

    def foreign(self, storage: dict[str, bytearray]) -> None:
        stranger = World(epochs=1).run_to(State.LINKED)
        storage["linkage-0-0"] = stranger.host.storage["linkage-0-0"]


def flip(name: str, at: int) -> Callable[[dict[str, bytearray]], None]:
    def harm(storage: dict[str, bytearray]) -> None:
        storage[name][at] ^= 1

    return harm


def drop(name: str) -> Callable[[dict[str, bytearray]], object]:
    return lambda storage: storage.pop(name)


BAD: dict[str, tuple[Callable[[Dispute], object], set[str]]] = {
    "an input of the wrong shape, by the client": (lambda d: d.ask(INPUT.reshape(1, 1, 2, 8)), {"ask.shape"}),
    "an input of the wrong type, by the client": (lambda d: d.ask(INPUT.astype("<f4")), {"ask.shape"}),
    "no input, by the client": (lambda d: d.ask(INPUT[:0]), {"ask.count"}),
    "an input of the wrong shape, past the client": (lambda d: d.query(INPUT[:, :, :3]), {"query.shape"}),
    "a model that was never linked": (
        lambda d: d.store.nearest(d.world.linked()[d.named][2].float()[None], model=OTHER, labels=None, k=1),
        {"linkage.unknown-model"},
    ),
    "links with a damaged segment": (lambda d: d.cold(flip("linkage-0-0-rows", 9)), {"segment.damaged"}),
    "links with a damaged header": (lambda d: d.reopened(flip("linkage-0-0", 80)), {"segment.damaged"}),
    "links with a missing segment": (lambda d: d.cold(drop("linkage-0-0-rows")), {"linkage.missing"}),
    "links with a foreign segment": (lambda d: d.reopened(d.foreign), {"linkage.foreign"}),
    "older links": (lambda d: d.reopened(drop("linkage-0-0")), {"linkage.older"}),
    "links of another generation": (
        lambda d: LinkageStore.open(
            Door(d.world.host.enclave_channel),
            Place(d.store.place.run, d.store.place.key, d.store.place.generation + 1),
            head=d.store.head,
        ),
        {"linkage.older"},
    ),
    "an unknown contributor": (lambda d: d.query(contributors=("delta",)), {"party.unknown"}),
    "a record that does not exist, to disclose": (Dispute.no_such_record, {"disclose.no-such-record"}),
    "a record that does not exist, to note": (Dispute.note_of_nobody, {"disclosure.not-own"}),
    "a record that does not exist, to remove": (
        lambda d: d.store.remove([RecordRef("alpha", "0" * 32, 1)], model=d.world.run.model_digest, time=1),
        {"linkage.unknown-record"},
    ),
    "more neighbours than the class has, of the store": (
        lambda d: d.store.nearest(
            d.world.linked()[d.named][2].float()[None], model=d.world.run.model_digest, labels=[0], k=500
        ),
        {"linkage.too-few"},
    ),
    "an empty class, of the store": (
        lambda d: d.store.nearest(
            d.world.linked()[d.named][2].float()[None], model=d.world.run.model_digest, labels=[7], k=1
        ),
        {"linkage.empty-class"},
    ),
    "a disclosure for another record": (Dispute.other_record, {"disclosure.not-traced"}),
    "a disclosure for another model": (lambda d: d.verify(d.told(model=OTHER)), {"disclosure.other-model"}),
    "a disclosure with another salt": (Dispute.other_salt, {"disclosure.substituted"}),
    "a disclosure with another record in it": (
        lambda d: d.verify(disclosed(d.world, d.named, record=b"another")),
        {"disclosure.substituted"},
    ),
    "a bundle with one byte changed": (
        Dispute.changed_byte,
        {"signature.invalid", "bundle.malformed", "payload.malformed", "bundle.other-manifest", "chain.broken"},
    ),
    "a budget that is spent": (Dispute.spent, {"user.budget-spent"}),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_a_named_error_and_nothing_is_lost(what: str, tmp_path: Path) -> None:
    dispute = Dispute(tmp_path)
    world, (act, codes) = dispute.world, BAD[what]
    head, stored = world.run.chain.head, {name: bytes(raw) for name, raw in world.host.storage.items()}
    with pytest.raises(CaltrainError) as raised:
        act(dispute)
    assert raised.value.code in codes
    counted = (
        1 if what.startswith("links with a") and raised.value.code in {"segment.damaged", "linkage.missing"} else 0
    )
    assert world.run.chain.head == head
    assert world.run.spent["una"] <= 1 + counted
    assert {name: bytes(raw) for name, raw in world.host.storage.items()} == stored
    asked = world.question("trace", INPUT)
    given = asked.open(world.done(m.Query("una", asked.envelope)).sealed["una"])
    again = open_envelope(given.traces[0], "trace", world.run.vault.signing.public, TraceStatement, step="test")
    assert again.neighbours == dispute.statement.neighbours
    dispute.verify(disclosed(world, dispute.named))


def test_nothing_is_traced_before_a_model_is_linked() -> None:
    world = World(epochs=1).run_to(State.RELEASED)
    before = world.run.chain.head
    envelope = world.users["una"].signer.sign("query", {})
    reply = world.send(m.Query("una", envelope))
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("session.not-now", False)
    assert (world.run.chain.head, world.run.spent) == (before, {})
    world.run_to(State.LINKED)
