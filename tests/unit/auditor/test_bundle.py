"""Trace bundles: each step of the check fails by its own name, and no byte of a bundle can be another one."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.auditor import bundle as bundles
from caltrain.auditor.bundle import TraceBundle, Verified, read_bundle, verify_bundle
from caltrain.auditor.collect import collect_bundle, encode_bundle
from caltrain.boundary import messages as m
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.dsse import Envelope, SigningKey, open_envelope
from caltrain.crypto.merkle import inclusion_proof
from caltrain.enclave.run import State
from caltrain.errors import CaltrainError, ConfigError, IntegrityError, LineageError, ProtocolError
from caltrain.plan import Plan, RunManifest
from caltrain.provenance.chain import Chain, EventKind
from caltrain.provenance.statements import LinkedModel
from caltrain.records.commitment import RecordRef
from caltrain.records.disclosure import Disclosure
from caltrain.training.spec import CenterSpec, InitialWeights
from support.folders import policy_of, signed_manifest
from support.repairs import repaired
from support.samples import refused
from support.scripted_host import ScriptedHost
from support.world import World, pictures
from support.worlds import finished_world

OTHER = "sha256:" + "0" * 64


def b64(raw: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(raw).decode()


def disclosed(world: World, reference: RecordRef, **changes: Any) -> Envelope:
    """A record of a party, disclosed by it; with `changes`, otherwise than it should be."""
    member = world.parties[reference.party]
    shard = next(shard for shard in member.shards if shard.header.shard == reference.shard)
    leaves = [shard.commitment(leaf) for leaf in range(len(shard.records))]
    honest = Disclosure(
        record_ref=reference,
        model=world.run.model_digest,
        records=len(leaves),
        salt=b64(shard.salts[reference.leaf]),
        record=b64(shard.records[reference.leaf]),
        proof=tuple(b64(part) for part in inclusion_proof(leaves, reference.leaf)),
    )
    return member.signer.sign("disclosure", msgspec.structs.replace(honest, **changes))


class Audit:
    """A bundle about one input, with two of its five neighbours disclosed, and the enclave's key to forge with."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or finished_world()
        self.input = pictures(1, seed=11)
        asked = self.world.question("trace", self.input)
        self.evidence, self.policy = asked.bundle, policy_of(self.world)
        answers = asked.open(self.world.done(m.Query("una", asked.envelope)).sealed["una"])
        self.signing = self.world.run.vault.signing
        self.trace = open_envelope(answers.traces[0], "trace", self.signing.public, TraceStatement, step="test")
        self.named = [neighbour.record for neighbour in self.trace.neighbours]
        self.head = self.world.run.chain.head
        with ScriptedHost(self.world).client() as client:
            self.bundle: TraceBundle = collect_bundle(
                client,
                self.world.plan,
                answers.traces[0],
                evidence=asked.bundle,
                disclosures=[disclosed(self.world, reference) for reference in self.named[:2]],
            )

    def verify(self, head: str | None = None, **changes: Any) -> Verified:
        """Check the bundle, with changes."""
        changed = msgspec.structs.replace(self.bundle, **changes)
        return verify_bundle(changed, plan_digest=self.world.plan.digest(), head=head, policy=self.policy)

    def refused(self, family: type[CaltrainError], code: str, **changes: Any) -> None:
        """With these changes the bundle is refused."""
        with refused(family, code):
            self.verify(**changes)

    def retraced(self, **changes: Any) -> Envelope:
        """Another trace that this enclave could have signed."""
        return self.signing.sign("trace", msgspec.structs.replace(self.trace, **changes))


@cache
def made() -> Audit:
    """One for all tests: nobody changes it."""
    return Audit()


@pytest.fixture
def audit() -> Audit:
    """A sound bundle."""
    return made()


def test_a_bundle_of_an_audited_run_says_so() -> None:
    def audited(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, center=CenterSpec(audit_rate=0.5, audit_steps=2))

    world = World(change=audited).run_to(State.LINKED)
    audit = Audit(world)
    verified = audit.verify(head=audit.head)
    assert (verified.center_audited, verified.audit_rate, verified.trace.audit_rate) == (True, 0.5, 0.5)
    assert {"audit", "checkpoint"} <= {event.kind for event in world.chain()}


def test_a_sound_bundle_says_what_it_proves(audit: Audit) -> None:
    verified, world = audit.verify(head=audit.head), audit.world
    assert (verified.plan, verified.run) == (world.plan.digest(), world.manifest.run)
    assert verified.model == world.run.model_digest
    assert verified.trace == audit.trace
    assert verified.undisclosed == tuple(audit.named[2:])
    assert (verified.events, verified.head) == (len(audit.bundle.chain), audit.head)
    assert verified.simulated
    assert (verified.center_audited, verified.trace.audit_rate) == (False, 0.0)
    for reference in audit.named[:2]:
        shards = world.parties[reference.party].shards
        shard = next(shard for shard in shards if shard.header.shard == reference.shard)
        assert verified.records[reference] == shard.records[reference.leaf]
    assert len(verified.records) == 2


def test_a_trace_from_before_there_were_methods_is_by_fingerprints(audit: Audit) -> None:
    said = msgspec.to_builtins(audit.trace)
    assert said.pop("method") == "fingerprint"
    verified = audit.verify(trace=audit.signing.sign("trace", msgspec.defstruct("Old", [*said])(**said)))
    assert verified.trace == audit.trace


def test_a_bundle_of_a_run_from_public_weights_says_so(audit: Audit) -> None:
    assert not audit.verify().front_public
    world, signing = audit.world, audit.signing
    initial = InitialWeights(sha256=OTHER)
    training = msgspec.structs.replace(world.plan.training, initial=initial)
    plan = msgspec.structs.replace(world.plan, training=training)
    manifest = msgspec.structs.replace(world.manifest, plan=plan.digest())
    chain = Chain(signing, run=manifest.run)
    events = (
        chain.append("plan", {"plan": plan.digest()}),
        chain.append("manifest", {"manifest": manifest.digest()}),
        chain.append("link", {"model": world.run.model_digest}),
    )
    head, asked = chain.head, chain.append("query", {"user": "una", "model": world.run.model_digest})
    binding = msgspec.structs.replace(audit.evidence.binding, plan=plan.digest())
    bundle = msgspec.structs.replace(
        audit.bundle,
        plan=plan,
        manifest=signing.sign("run-manifest", manifest),
        countersignatures={name: party.countersign(manifest) for name, party in world.parties.items()},
        trace=audit.retraced(head=head),
        evidence=msgspec.structs.replace(audit.evidence, binding=binding),
        chain=(*events, asked),
    )
    assert verify_bundle(bundle, plan_digest=plan.digest()).front_public


@cache
def mended() -> Audit:
    """A bundle of a run that left out some records."""
    return Audit(repaired().run_to(State.LINKED))


def test_a_bundle_of_a_repair_says_what_was_left_out(audit: Audit) -> None:
    assert audit.verify().repair is None
    assert mended().verify().repair == mended().world.plan.repair


def test_a_link_that_does_not_say_of_the_repair_what_the_plan_says_is_refused(audit: Audit) -> None:
    repair = mended().world.plan.repair
    assert repair
    for one, said in ((audit, repair), (mended(), None), (mended(), msgspec.structs.replace(repair, records=3))):
        linked = msgspec.structs.replace(one.world.statement("linked-model", LinkedModel), repair=said)
        one.refused(LineageError, "bundle.other-repair", linked=one.signing.sign("linked-model", linked))


def test_a_chain_without_the_repair_is_refused() -> None:
    one, world = mended(), mended().world
    for body in (None, {"quarantine": OTHER}):
        chain = Chain(one.signing, run=world.manifest.run)
        events = [
            chain.append("plan", {"plan": world.plan.digest()}),
            chain.append("manifest", {"manifest": world.manifest.digest()}),
            *([chain.append("repair", body)] if body else []),
            chain.append("link", {"model": world.run.model_digest}),
        ]
        trace = one.retraced(head=chain.head)
        one.refused(LineageError, "bundle.not-in-chain", chain=tuple(events), trace=trace)


def test_a_head_that_a_party_kept_earlier_is_passed(audit: Audit) -> None:
    events = audit.world.chain()
    for event in events[:: len(events) // 3]:
        audit.verify(head=event.digest())
    with refused(LineageError, "chain.other-head"):
        audit.verify(head=OTHER)


# -- (1) the plan ------------------------------------------------------------------------------------------------


def test_step_1_another_plan_is_refused(audit: Audit) -> None:
    for changes in ({"name": "another"}, {"parties": audit.bundle.plan.parties[::-1]}):
        plan = msgspec.structs.replace(audit.bundle.plan, **changes)
        audit.refused(LineageError, "bundle.other-plan", plan=plan)
    with refused(LineageError, "bundle.other-plan"):
        verify_bundle(audit.bundle, plan_digest=OTHER)


def test_step_1_a_plan_that_is_none_is_refused(audit: Audit) -> None:
    twice = msgspec.structs.replace(audit.bundle.plan, parties=audit.bundle.plan.parties * 2)
    audit.refused(ConfigError, "plan.duplicate", plan=twice)


# -- (2) the countersignatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_step_2_a_manifest_that_a_party_did_not_sign_is_refused(audit: Audit, name: str) -> None:
    signed = audit.bundle.countersignatures
    without = {party: envelope for party, envelope in signed.items() if party != name}
    audit.refused(LineageError, "bundle.not-countersigned", countersignatures=without)
    forged = signed | {name: SigningKey().sign("manifest-approval", {})}
    audit.refused(IntegrityError, "signature.invalid", countersignatures=forged)
    other = audit.world.parties[name].countersign(msgspec.structs.replace(audit.world.manifest, run="0" * 32))
    audit.refused(IntegrityError, "approval.other-manifest", countersignatures=signed | {name: other})


def test_step_2_a_manifest_that_was_changed_after_they_signed_is_refused(audit: Audit) -> None:
    shards = audit.world.manifest.parties[0].shards
    fewer = msgspec.structs.replace(audit.world.manifest.parties[0], shards=shards[:1])
    changed = msgspec.structs.replace(audit.world.manifest, parties=(fewer, *audit.world.manifest.parties[1:]))
    audit.refused(IntegrityError, "approval.other-manifest", manifest=audit.signing.sign("run-manifest", changed))


# -- (3) manifest and link are the enclave's ---------------------------------------------------------------------


def countersigned(audit: Audit, manifest: RunManifest) -> dict[str, Envelope]:
    """All parties sign another manifest."""
    return {name: member.countersign(manifest) for name, member in audit.world.parties.items()}


def test_step_3_a_manifest_of_another_key_than_it_names_is_refused(audit: Audit) -> None:
    audit.refused(
        LineageError, "bundle.other-manifest", manifest=SigningKey().sign("run-manifest", audit.world.manifest)
    )
    own = SigningKey()
    manifest = msgspec.structs.replace(audit.world.manifest, enclave_signing_key=own.public)
    audit.refused(LineageError, "bundle.other-manifest", manifest=audit.signing.sign("run-manifest", manifest))


def test_step_3_a_manifest_of_another_plan_is_refused_though_all_signed_it(audit: Audit) -> None:
    manifest = msgspec.structs.replace(audit.world.manifest, plan=OTHER)
    audit.refused(
        LineageError,
        "bundle.other-manifest",
        manifest=audit.signing.sign("run-manifest", manifest),
        countersignatures=countersigned(audit, manifest),
    )


def test_step_3_a_manifest_of_another_program_is_refused_though_all_signed_it(audit: Audit) -> None:
    manifest = msgspec.structs.replace(audit.world.manifest, measurement="sha384:" + "cd" * 48)
    audit.refused(
        LineageError,
        "bundle.other-manifest",
        manifest=audit.signing.sign("run-manifest", manifest),
        countersignatures=countersigned(audit, manifest),
    )


def test_step_3_an_enclave_that_nobody_countersigned_proves_nothing(audit: Audit) -> None:
    own = SigningKey()
    manifest = msgspec.structs.replace(audit.world.manifest, enclave_signing_key=own.public)
    audit.refused(IntegrityError, "approval.other-manifest", manifest=own.sign("run-manifest", manifest))


def test_step_3_a_link_that_the_enclave_did_not_sign_is_refused(audit: Audit) -> None:
    honest = audit.world.statement("linked-model", LinkedModel)
    audit.refused(IntegrityError, "signature.invalid", linked=SigningKey().sign("linked-model", honest))
    audit.refused(IntegrityError, "signature.invalid", linked=audit.signing.sign("model", honest))


# -- (4) the trace -----------------------------------------------------------------------------------------------


def test_step_4_a_trace_that_the_enclave_did_not_sign_is_refused(audit: Audit) -> None:
    audit.refused(IntegrityError, "signature.invalid", trace=SigningKey().sign("trace", audit.trace))
    audit.refused(IntegrityError, "signature.invalid", trace=audit.signing.sign("query", audit.trace))


@pytest.mark.parametrize("changes", [{"model": OTHER}, {"run": "0" * 32}])
def test_step_4_a_trace_of_another_model_or_run_is_refused(audit: Audit, changes: dict[str, str]) -> None:
    audit.refused(LineageError, "bundle.other-model", trace=audit.retraced(**changes))


@pytest.mark.parametrize("changes", [{"model": OTHER}, {"run": "0" * 32}])
def test_step_4_a_link_of_another_model_or_run_is_refused(audit: Audit, changes: dict[str, str]) -> None:
    linked = msgspec.structs.replace(audit.world.statement("linked-model", LinkedModel), **changes)
    audit.refused(LineageError, "bundle.other-model", linked=audit.signing.sign("linked-model", linked))


def test_step_4_trace_and_link_of_one_other_run_are_refused(audit: Audit) -> None:
    linked = msgspec.structs.replace(audit.world.statement("linked-model", LinkedModel), run="0" * 32)
    audit.refused(
        LineageError,
        "bundle.other-model",
        linked=audit.signing.sign("linked-model", linked),
        trace=audit.retraced(run="0" * 32),
    )


# -- (5) the chain -----------------------------------------------------------------------------------------------

Events = tuple[Envelope, ...]
CHAINS: dict[str, Callable[[Events], Sequence[Envelope]]] = {
    "without its first event": lambda chain: chain[1:],
    "without one in the middle": lambda chain: (*chain[:4], *chain[5:]),
    "with one twice": lambda chain: (*chain[:4], chain[3], *chain[4:]),
    "with two exchanged": lambda chain: (chain[1], chain[0], *chain[2:]),
}


@pytest.mark.parametrize("what", CHAINS)
def test_step_5_a_chain_that_is_not_whole_is_refused(audit: Audit, what: str) -> None:
    audit.refused(LineageError, "chain.broken", chain=tuple(CHAINS[what](audit.bundle.chain)))


def test_step_5_a_chain_cut_before_the_link_is_refused(audit: Audit) -> None:
    kinds = [event.kind for event in audit.world.chain()]
    for length in (0, 1, kinds.index("manifest"), kinds.index("link")):
        audit.refused(LineageError, "bundle.not-in-chain", chain=audit.bundle.chain[:length])


def test_step_5_a_chain_of_another_key_is_refused(audit: Audit) -> None:
    chain = Chain(SigningKey(), run=audit.world.manifest.run)
    audit.refused(IntegrityError, "signature.invalid", chain=(chain.append("plan", {}),))


def test_step_5_a_chain_that_does_not_reach_the_trace_is_refused(audit: Audit) -> None:
    audit.refused(LineageError, "bundle.other-chain", chain=chain_of(audit, missing="", how=""))


def chain_of(audit: Audit, *, missing: str, how: str) -> Events:
    """A sound chain of these three events, one of them missing or of something else."""
    chain, world = Chain(audit.signing, run=audit.world.manifest.run), audit.world
    bodies: dict[EventKind, dict[str, str]] = {
        "plan": {"plan": world.plan.digest()},
        "manifest": {"manifest": world.manifest.digest()},
        "link": {"model": world.run.model_digest},
    }
    return tuple(
        chain.append(kind, body if kind != missing else dict.fromkeys(body, OTHER))
        for kind, body in bodies.items()
        if kind != missing or how != "not at all"
    )


@pytest.mark.parametrize("missing", ["plan", "manifest", "link"])
@pytest.mark.parametrize("how", ["not at all", "of something else"])
def test_step_5_a_chain_without_plan_manifest_or_link_is_refused(audit: Audit, missing: str, how: str) -> None:
    audit.refused(LineageError, "bundle.not-in-chain", chain=chain_of(audit, missing=missing, how=how))


# -- (6) the disclosures -----------------------------------------------------------------------------------------


def with_one(audit: Audit, **changes: Any) -> tuple[Envelope, ...]:
    """One disclosure that is not as it should be, after a sound one."""
    return (audit.bundle.disclosures[1], disclosed(audit.world, audit.named[0], **changes))


def test_step_6_a_substituted_record_is_refused(audit: Audit) -> None:
    reference = audit.named[0]
    shard = next(s for s in audit.world.parties[reference.party].shards if s.header.shard == reference.shard)
    other = (reference.leaf + 1) % len(shard.records)
    for changes in (
        {"record": b64(shard.records[other])},
        {"record": b64(shard.records[other]), "salt": b64(shard.salts[other])},
        {"salt": b64(bytes(32))},
    ):
        audit.refused(LineageError, "disclosure.substituted", disclosures=with_one(audit, **changes))


def test_step_6_a_record_that_was_not_in_the_shard_is_refused(audit: Audit) -> None:
    honest = open_envelope(
        disclosed(audit.world, audit.named[0]),
        "disclosure",
        audit.world.parties[audit.named[0].party].signer.public,
        Disclosure,
        step="test",
    )
    for changes in ({"proof": honest.proof[::-1]}, {"records": honest.records - 1}):
        audit.refused(LineageError, "disclosure.not-in-shard", disclosures=with_one(audit, **changes))


def test_step_6_a_record_that_the_trace_does_not_name_is_refused(audit: Audit) -> None:
    everything = [
        RecordRef(name, shard.header.shard, leaf)
        for name, member in audit.world.parties.items()
        for shard in member.shards
        for leaf in range(len(shard.records))
    ]
    other = next(reference for reference in everything if reference not in audit.named)
    audit.refused(LineageError, "disclosure.not-traced", disclosures=(disclosed(audit.world, other),))


def test_step_6_a_record_disclosed_by_another_party_is_refused(audit: Audit) -> None:
    reference = audit.named[0]
    other = next(member for name, member in audit.world.parties.items() if name != reference.party)
    stolen = open_envelope(
        disclosed(audit.world, reference),
        "disclosure",
        audit.world.parties[reference.party].signer.public,
        Disclosure,
        step="test",
    )
    audit.refused(LineageError, "disclosure.not-traced", disclosures=(other.signer.sign("disclosure", stolen),))


def test_step_6_a_disclosure_of_a_stranger_is_refused(audit: Audit) -> None:
    stranger = SigningKey()
    audit.refused(
        LineageError, "disclosure.unknown-signer", disclosures=(stranger.sign("disclosure", {"any": "thing"}),)
    )
    user = audit.world.users["una"].signer
    audit.refused(LineageError, "disclosure.unknown-signer", disclosures=(user.sign("disclosure", {}),))


def test_step_6_another_statement_of_a_party_is_no_disclosure(audit: Audit) -> None:
    member = audit.world.parties["alpha"]
    audit.refused(IntegrityError, "signature.invalid", disclosures=(member.approve(audit.world.plan),))


def test_step_6_a_traced_record_outside_the_manifest_is_refused(audit: Audit) -> None:
    reference = audit.named[0]
    elsewhere = msgspec.structs.replace(reference, shard="0" * 32)
    moved = msgspec.structs.replace(audit.trace.neighbours[0], record=elsewhere)
    trace = audit.retraced(neighbours=(moved, *audit.trace.neighbours[1:]))
    told = disclosed(audit.world, reference, record_ref=elsewhere)
    audit.refused(LineageError, "disclosure.not-in-manifest", trace=trace, disclosures=(told,))


# -- as a file ---------------------------------------------------------------------------------------------------


def test_a_bundle_is_read_back_as_it_was_written(audit: Audit, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(encode_bundle(audit.bundle))
    assert read_bundle(tmp_path / "bundle.json") == audit.bundle


def test_no_byte_of_a_bundle_can_be_another_one(audit: Audit, tmp_path: Path) -> None:
    raw = encode_bundle(audit.bundle)
    path, draw = tmp_path / "bundle.json", random.Random(1)
    for _ in range(500):
        at, bit = draw.randrange(len(raw)), draw.randrange(8)
        changed = bytearray(raw)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(CaltrainError) as caught:
            verify_bundle(
                read_bundle(path), plan_digest=audit.world.plan.digest(), head=audit.head, policy=audit.policy
            )
        assert caught.value.code, (at, bit)


GARBAGE = [b"", b"{}", b"null", b"<html>", b"\xff\xfe", b'{"plan":' + b"[" * 100_000, b"[" * 100_000]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_file_that_is_no_bundle_is_named(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "bundle.json").write_bytes(garbage)
    with refused(IntegrityError, "bundle.malformed") as caught:
        read_bundle(tmp_path / "bundle.json")
    assert "bundle.json" in caught.value.what


def test_a_bundle_of_another_version_or_with_more_in_it_is_refused(audit: Audit, tmp_path: Path) -> None:
    fields = msgspec.json.decode(encode_bundle(audit.bundle))
    for changes in ({"version": 2}, {"more": 1}, {"chain": [1]}, {"disclosures": [fields["trace"]] * 101}):
        (tmp_path / "bundle.json").write_bytes(msgspec.json.encode(fields | changes))
        with refused(IntegrityError, "bundle.malformed"):
            read_bundle(tmp_path / "bundle.json")


def test_a_file_that_is_not_there_or_too_large_is_named(
    audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(IntegrityError, "bundle.malformed"):
        read_bundle(tmp_path / "bundle.json")
    (tmp_path / "bundle.json").write_bytes(encode_bundle(audit.bundle))
    monkeypatch.setattr(bundles, "MAX_BUNDLE_BYTES", len(encode_bundle(audit.bundle)) - 1)
    with refused(IntegrityError, "bundle.malformed"):
        read_bundle(tmp_path / "bundle.json")


# -- collecting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["suspicion.json", "countersignatures/beta.json", "chain.jsonl"])
@pytest.mark.parametrize("garbage", [b"{}\n", b"<html>", b"[" * 100_000])
def test_garbage_is_not_collected(audit: Audit, name: str, garbage: bytes) -> None:
    host = ScriptedHost(audit.world)
    host.edit[f"/v1/artifacts/{name}"] = lambda _: garbage
    with host.client() as client, refused(IntegrityError, "envelope.malformed"):
        collect_bundle(client, audit.world.plan, audit.bundle.trace, evidence=audit.evidence)


def test_a_manifest_without_form_or_an_artifact_that_is_missing_is_named(audit: Audit) -> None:
    for path in ("/v1/manifest", "/v1/artifacts/suspicion.json"):
        host = ScriptedHost(audit.world)
        host.edit[path] = lambda _: httpx.Response(404, content=b"<html>")
        with host.client() as client, refused(ProtocolError, "host.garbage"):
            collect_bundle(client, audit.world.plan, audit.bundle.trace, evidence=audit.evidence)


def test_the_collected_manifest_is_the_enclaves(audit: Audit) -> None:
    assert audit.bundle.manifest == signed_manifest(audit.world)
