"""From the plan to the last countersignature: nobody comes in unasked, in another's name, or with another's consent."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from caltrain.attestation.evidence import Binding
from caltrain.attestation.verify import Policy, verify_evidence
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import ProvisionReceipt, SealedMessage, transcript_digest
from caltrain.crypto import hpke
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.enclave import vault
from caltrain.enclave.run import State
from caltrain.errors import AttestationError, EnvironmentFault
from caltrain.plan import ManifestParty, Plan, RunManifest
from caltrain.records.shard import key_id
from caltrain.training.seeds import run_seed
from support.world import MEASUREMENT, PARTIES, World

OTHER_KEY = hpke.HpkePrivateKey()
FULL = EnvironmentFault("storage.full", "the disk is full", step="write", fix="Free space.").diagnostics()
Attack = Callable[[World], m.Request]


def another(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, name="another")


def altered(envelope: Envelope) -> Envelope:
    """The same envelope with one bit of its payload flipped."""
    body = bytearray(base64.b64decode(envelope.payload))
    body[len(body) // 2] ^= 1
    return msgspec.structs.replace(envelope, payload=base64.b64encode(body).decode())


# --- configure ------------------------------------------------------------------------------------------------------


def with_approval(forge: Callable[[World], Envelope]) -> Attack:
    """The honest demand, but for beta's approval."""

    def attack(world: World) -> m.Request:
        honest = world.configure()
        return m.Configure(honest.plan, honest.approvals | {"beta": forge(world)})

    return attack


def with_plan(change: Callable[[bytes], bytes]) -> Attack:
    """The honest demand, but for the plan's text."""

    def attack(world: World) -> m.Request:
        honest = world.configure()
        return m.Configure(change(honest.plan), honest.approvals)

    return attack


def without_beta(world: World) -> m.Request:
    honest = world.configure()
    return m.Configure(honest.plan, {name: honest.approvals[name] for name in ("alpha", "gamma")})


CONFIGURE: dict[str, tuple[Attack, str]] = {
    "no JSON": (with_plan(lambda plan: plan[:-1]), "plan.invalid"),
    "unknown key": (with_plan(lambda plan: plan[:-1] + b',"extra":1}'), "plan.unknown-key"),
    "another program": (with_plan(lambda plan: plan.replace(b"ab" * 48, b"ac" * 48)), "plan.other-measurement"),
    "one party's approval is missing": (without_beta, "provision.not-approved"),
    "approved another plan": (
        with_approval(lambda w: w.parties["beta"].approve(another(w.plan))),
        "approval.other-plan",
    ),
    "the plan is another than was approved": (
        with_plan(lambda plan: plan.replace(b'"epochs":2', b'"epochs":3')),
        "approval.other-plan",
    ),
    "beta signs for alpha": (
        with_approval(lambda w: w.parties["beta"].approve(w.plan, party="alpha")),
        "approval.other-plan",
    ),
    "alpha signs for beta": (
        with_approval(lambda w: w.parties["alpha"].approve(w.plan, party="beta")),
        "signature.invalid",
    ),
    "altered": (with_approval(lambda w: altered(w.parties["beta"].approve(w.plan))), "signature.invalid"),
    "signed for something else": (
        with_approval(lambda w: w.parties["beta"].note(run="0" * 32, commitment=w.plan.digest())),
        "signature.invalid",
    ),
}


@pytest.mark.parametrize("name", CONFIGURE)
def test_a_plan_that_not_every_party_approved_as_it_stands_is_refused(name: str) -> None:
    attack, code = CONFIGURE[name]
    world = World()
    world.refused(attack(world), code)
    assert world.run.plan is None
    world.run_to(State.ENROLLING)  # nothing stands in the way of the honest one


def test_a_missing_approval_names_the_party() -> None:
    world = World()
    assert "beta" in world.refused(without_beta(world), "provision.not-approved")["what"]


def test_an_approval_of_somebody_else_is_not_looked_at() -> None:
    world = World()
    honest, una = world.configure(), world.users["una"]
    world.done(m.Configure(honest.plan, honest.approvals | {"una": altered(una.approve(world.plan))}))
    assert [event.body.get("party") for event in world.chain()] == [None, *PARTIES]


# --- attest ---------------------------------------------------------------------------------------------------------


def test_evidence_speaks_for_these_keys_this_plan_purpose_and_nonce() -> None:
    world = World().run_to(State.ENROLLING)
    nonce = os.urandom(32).hex()
    bundle = world.attest(nonce=nonce)
    policy = Policy(measurements=(MEASUREMENT,), allow_simulated=True, simulated_roots=(world.root.public,))
    verify_evidence(bundle, policy, purpose="training", plan=world.plan.digest(), nonce=nonce, now=datetime.now(UTC))
    keys = world.run.vault
    assert (bundle.binding.encryption_key, bundle.binding.signing_key) == (keys.encryption.public, keys.signing.public)
    with pytest.raises(AttestationError):
        verify_evidence(bundle, policy, purpose="query", plan=world.plan.digest(), nonce=nonce, now=datetime.now(UTC))


@pytest.mark.parametrize(("state", "purpose"), [(State.ENROLLING, "query"), (State.LINKED, "training")])
def test_a_run_gives_evidence_only_for_what_it_now_serves(state: State, purpose: Any) -> None:
    world = World(epochs=1).run_to(state)
    nonce = os.urandom(32).hex()
    world.refused(m.Attest(purpose, nonce), "attest.purpose")
    world.attest("training" if purpose == "query" else "query", nonce=nonce)  # the nonce is still fresh


def test_a_nonce_is_answered_once_before_and_after_it_served() -> None:
    world = World().run_to(State.ENROLLING)
    bundle = world.attest(nonce="ab" * 32)
    world.refused(m.Attest("training", "ab" * 32), "nonce.reused")
    world.done(m.Provision("alpha", world.parties["alpha"].provision(bundle.binding)))
    world.refused(m.Attest("training", "ab" * 32), "nonce.reused")


def test_a_flood_of_nonces_pushes_out_the_oldest_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "MAX_PENDING", 3)
    world = World().run_to(State.ENROLLING)
    bundles = [world.attest() for _ in range(4)]
    alpha = world.parties["alpha"]
    world.refused(m.Provision("alpha", alpha.provision(bundles[0].binding)), "nonce.unknown")
    world.done(m.Provision("alpha", alpha.provision(bundles[1].binding)))


# --- provision ------------------------------------------------------------------------------------------------------


def bound(**changes: Any) -> Attack:
    """Alpha seals for fresh evidence, but takes another binding for true."""

    def attack(world: World) -> m.Request:
        binding = msgspec.structs.replace(world.attest().binding, **changes)
        return m.Provision("alpha", world.parties["alpha"].provision(binding))

    return attack


def secret(change: Callable[[World], dict[str, Any]]) -> Attack:
    """Alpha hands over another secret than it should."""
    return lambda world: m.Provision("alpha", world.parties["alpha"].provision(world.attest().binding, **change(world)))


def handmade(make: Callable[[World, Binding], dict[str, Any]]) -> Attack:
    """Alpha signs a sealed message, some fields of which are not what `seal_message` would write."""

    def attack(world: World) -> m.Request:
        binding, alpha = world.attest().binding, world.parties["alpha"]
        honest = open_envelope(alpha.provision(binding), "provision", alpha.signer.public, SealedMessage, step="test")
        forged = msgspec.structs.replace(honest, **make(world, binding))
        return m.Provision("alpha", alpha.signer.sign("provision", forged))

    return attack


def sealed_to(key: str, info: str, plain: bytes) -> dict[str, Any]:
    return {"sealed": base64.b64encode(hpke.seal_to(key, plain, info=info.encode())).decode()}


def packed_secret(world: World) -> bytes:
    return msgspec.msgpack.encode(world.parties["alpha"].secret())


def replayed(world: World) -> m.Request:
    request = world.provision("alpha")
    world.done(request)
    return request


def replayed_as_betas(world: World) -> m.Request:
    return m.Provision("beta", world.provision("alpha").envelope)


def in_alphas_name(world: World) -> m.Request:
    return m.Provision("beta", world.parties["beta"].provision(world.attest().binding, sender="alpha"))


def with_betas_key(world: World) -> dict[str, Any]:
    world.done(world.provision("beta"))
    return {"data_key": world.parties["beta"].data_key}


def same_id_twice(world: World) -> dict[str, Any]:
    first, second = (shard.entry for shard in world.parties["alpha"].shards)
    return {"shards": (first, msgspec.structs.replace(second, shard=first.shard))}


def same_root_twice(world: World) -> dict[str, Any]:
    first, second = (shard.entry for shard in world.parties["alpha"].shards)
    return {"shards": (first, msgspec.structs.replace(second, root=first.root))}


def empty_shard(world: World) -> dict[str, Any]:
    return {"shards": (msgspec.structs.replace(world.parties["alpha"].shards[0].entry, records=0),)}


PROVISION: dict[str, tuple[Attack, str]] = {
    "unknown party": (lambda w: m.Provision("delta", w.provision("alpha").envelope), "party.unknown"),
    "a model user": (lambda w: m.Provision("una", w.provision("alpha").envelope), "party.unknown"),
    "alpha's message as beta's": (replayed_as_betas, "signature.invalid"),
    "altered": (lambda w: m.Provision("alpha", altered(w.provision("alpha").envelope)), "signature.invalid"),
    "signed by beta in alpha's name": (in_alphas_name, "provision.other-sender"),
    "sealed for another plan": (bound(plan="sha256:" + "0" * 64), "sealed.malformed"),
    "sealed for another purpose": (bound(purpose="query"), "sealed.malformed"),
    "sealed for another enclave": (bound(encryption_key=OTHER_KEY.public), "sealed.malformed"),
    "an enclave with another signing key": (bound(signing_key=SigningKey().public), "sealed.malformed"),
    "nonce of our own": (bound(nonce="cd" * 32), "nonce.unknown"),
    "replayed": (replayed, "nonce.unknown"),
    "transcript of another nonce": (
        handmade(lambda w, _b: {"transcript": transcript_digest(w.attest().binding, "alpha")}),
        "sealed.malformed",
    ),
    "right transcript, sealed to another key": (
        handmade(lambda w, b: sealed_to(OTHER_KEY.public, transcript_digest(b, "alpha"), packed_secret(w))),
        "hpke.not-authentic",
    ),
    "right key, sealed for another transcript": (
        handmade(lambda w, b: sealed_to(b.encryption_key, transcript_digest(b, "beta"), packed_secret(w))),
        "hpke.not-authentic",
    ),
    "no base64": (handmade(lambda _w, _b: {"sealed": "!"}), "sealed.malformed"),
    "no secret in it": (
        handmade(lambda _w, b: sealed_to(b.encryption_key, transcript_digest(b, "alpha"), b"\x90")),
        "sealed.malformed",
    ),
    "short data key": (secret(lambda _w: {"data_key": bytes(31)}), "sealed.malformed"),
    "no shards": (secret(lambda _w: {"shards": ()}), "sealed.malformed"),
    "empty shard": (secret(empty_shard), "sealed.malformed"),
    "one shard id twice": (secret(same_id_twice), "provision.duplicate-shard"),
    "one root twice": (secret(same_root_twice), "provision.duplicate-shard"),
    "beta's data key": (secret(with_betas_key), "provision.shared-key"),
    "too few records": (
        secret(lambda w: {"shards": (w.parties["alpha"].shards[0].entry,)}),
        "provision.too-few-records",
    ),
}


def at_least_nine(plan: Plan) -> Plan:
    return msgspec.structs.replace(
        plan, parties=tuple(msgspec.structs.replace(party, min_records=9) for party in plan.parties)
    )


@pytest.mark.parametrize("name", PROVISION)
def test_a_secret_that_was_not_handed_over_as_it_should_is_not_taken(name: str) -> None:
    attack, code = PROVISION[name]
    world = World(change=at_least_nine).run_to(State.ENROLLING)
    request = attack(world)  # what goes before it may succeed
    world.refused(request, code)
    world.run_to(State.AGREEING)  # and the honest party can still join


def test_a_message_for_the_same_plan_in_another_enclave_is_refused() -> None:
    here, there = World(), World()
    there.parties, there.plan = here.parties, here.plan
    nonce = os.urandom(32).hex()
    evidence = [world.run_to(State.ENROLLING).attest(nonce=nonce) for world in (here, there)]
    sealed_there = here.parties["alpha"].provision(evidence[1].binding)
    here.refused(m.Provision("alpha", sealed_there), "sealed.malformed")
    there.done(m.Provision("alpha", sealed_there))


def test_the_receipt_names_the_message_that_was_opened() -> None:
    world = World().run_to(State.ENROLLING)
    binding = world.attest().binding
    signed = world.done(m.Provision("alpha", world.parties["alpha"].provision(binding))).signed
    assert signed is not None
    receipt = open_envelope(signed, "provision-receipt", binding.signing_key, ProvisionReceipt, step="test")
    assert receipt.transcript == transcript_digest(binding, "alpha")


def test_a_party_may_replace_what_it_handed_over_until_the_manifest() -> None:
    world = World().run_to(State.ENROLLING)
    world.done(world.provision("alpha"))
    alpha = world.parties["alpha"]
    alpha.shards = alpha.shards[:1]
    world.run_to(State.AGREEING)
    assert world.manifest.parties[0].shards == (alpha.shards[0].entry,)
    noted = [(e.body["party"], e.body["shards"]) for e in world.chain() if e.kind == "provision"]
    assert noted == [("alpha", 2), ("alpha", 1), ("beta", 2), ("gamma", 2)]


# --- manifest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", PARTIES)
def test_there_is_no_manifest_before_every_party_is_in(absent: str) -> None:
    world = World().run_to(State.ENROLLING)
    for name in set(PARTIES) - {absent}:
        world.done(world.provision(name))
    assert absent in world.refused(m.MakeManifest(), "provision.missing")["what"]
    assert world.run.manifest is None


def test_records_that_do_not_fill_one_batch_make_no_manifest() -> None:
    world = World(change=lambda plan: with_batch(plan, 28)).run_to(State.ENROLLING)
    for name in PARTIES:
        world.done(world.provision(name))
    world.refused(m.MakeManifest(), "manifest.too-few-records")
    assert world.run.manifest is None


def test_records_that_fill_exactly_one_batch_do() -> None:
    assert World(change=lambda plan: with_batch(plan, 27)).run_to(State.TRAINED).course.epoch == 2


def with_batch(plan: Plan, batch: int) -> Plan:
    training = msgspec.structs.replace(plan.training, batch=batch)
    return msgspec.structs.replace(plan, training=training)


def test_the_manifest_says_who_with_which_shards_in_which_enclave() -> None:
    world = World().run_to(State.ENROLLING)
    for name in reversed(PARTIES):
        world.done(world.provision(name))
    signed, keys = world.done(m.MakeManifest()).signed, world.run.vault
    assert signed is not None
    manifest = open_envelope(signed, "run-manifest", keys.signing.public, RunManifest, step="test")
    assert manifest == RunManifest(
        run=keys.run,
        plan=world.plan.digest(),
        evidence_kind="simulated",
        simulated=True,
        measurement=MEASUREMENT,
        enclave_encryption_key=keys.encryption.public,
        enclave_signing_key=keys.signing.public,
        parties=tuple(
            ManifestParty(name=p.name, key_id=key_id(p.data_key), shards=tuple(s.entry for s in p.shards))
            for p in world.parties.values()
        ),
    )


# --- countersignatures ----------------------------------------------------------------------------------------------


def other_manifest(world: World) -> RunManifest:
    return msgspec.structs.replace(world.manifest, parties=world.manifest.parties[:1])


COUNTERSIGN: dict[str, tuple[Attack, str]] = {
    "unknown party": (
        lambda w: m.Countersign("delta", w.parties["alpha"].countersign(w.manifest)),
        "party.unknown",
    ),
    "another manifest": (
        lambda w: m.Countersign("beta", w.parties["beta"].countersign(other_manifest(w))),
        "approval.other-manifest",
    ),
    "alpha signs for beta": (
        lambda w: m.Countersign("beta", w.parties["alpha"].countersign(w.manifest, party="beta")),
        "signature.invalid",
    ),
    "beta signs in alpha's name": (
        lambda w: m.Countersign("beta", w.parties["beta"].countersign(w.manifest, party="alpha")),
        "approval.other-manifest",
    ),
    "altered": (
        lambda w: m.Countersign("beta", altered(w.parties["beta"].countersign(w.manifest))),
        "signature.invalid",
    ),
    "the first approval again": (
        lambda w: m.Countersign("beta", w.parties["beta"].approve(w.plan)),
        "signature.invalid",
    ),
}


@pytest.mark.parametrize("name", COUNTERSIGN)
def test_what_is_no_signature_over_this_manifest_does_not_count(name: str) -> None:
    attack, code = COUNTERSIGN[name]
    world = World().run_to(State.AGREEING)
    world.done(m.Countersign("alpha", world.parties["alpha"].countersign(world.manifest)))
    world.refused(attack(world), code)
    assert world.run.countersigned == {"alpha"}
    world.run_to(State.AGREED)


def test_a_countersignature_of_another_run_of_the_same_plan_is_refused() -> None:
    here, there = World(), World()
    there.parties, there.plan = here.parties, here.plan
    for world in (here, there):
        world.run_to(State.AGREEING)
    envelope = here.parties["alpha"].countersign(here.manifest)
    there.refused(m.Countersign("alpha", envelope), "approval.other-manifest")


def test_one_party_signing_often_does_not_stand_for_the_others() -> None:
    world = World().run_to(State.AGREEING)
    envelope = world.parties["alpha"].countersign(world.manifest)
    for _ in range(len(PARTIES) + 1):
        world.done(m.Countersign("alpha", envelope))
    assert world.run.state is State.AGREEING
    assert "checkpoint-0" not in world.host.storage  # the run has not begun
    assert [event.kind for event in world.chain()].count("countersignature") == 1


def test_a_host_that_does_not_store_the_first_checkpoint_leaves_the_last_signature_out() -> None:
    world = World().run_to(State.AGREEING)
    requests = [m.Countersign(p.name, p.countersign(world.manifest)) for p in world.parties.values()]
    for request in requests[:-1]:
        world.done(request)
    honest, world.host.on_write = world.host.on_write, lambda _call: m.CallFailed(FULL)
    head = world.run.chain.head
    reply = world.send(requests[-1])
    assert isinstance(reply, m.Failed)
    assert (reply.error["code"], reply.fatal) == ("storage.full", False)
    assert world.run.state is State.AGREEING
    assert (world.run.chain.head, len(world.run.countersigned)) == (head, len(PARTIES) - 1)
    world.host.on_write = honest
    world.done(requests[-1])
    assert [event.kind for event in world.chain()][-2:] == ["countersignature", "checkpoint"]
    assert world.take_up().state == "agreed"


def test_the_run_seed_is_of_the_enclave_and_of_every_party() -> None:
    world = World().run_to(State.AGREED)
    entropies = [party.entropy for party in world.parties.values()]
    assert world.run.seed == run_seed(world.run.vault.randomness, entropies)
    for i in range(len(entropies)):
        changed = [*entropies[:i], bytes(32), *entropies[i + 1 :]]
        assert run_seed(world.run.vault.randomness, changed) != world.run.seed
