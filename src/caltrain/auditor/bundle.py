"""A trace bundle: all that a third party needs to check a trace and its disclosures, and the check itself.

The trust anchor is the plan's digest, which the auditor knows from elsewhere (each party can tell it). From there:
  (1) the bundle's plan has that digest, so its keys are the parties' keys;
  (2) every party countersigned the manifest, so its enclave keys and shard roots are what all of them verified;
  (3) the manifest and the linked model are signed by that enclave;
  (4) the trace is signed by it, and is of the linked model;
  (5) the chain is whole, signed, holds plan, manifest and link, and reaches to where the trace was asked for;
  (6) each disclosure is signed by its contributor, names a record of the trace, hashes to its commitment, and is in
      the shard whose root the manifest holds.
It does not show that the enclave was genuine: that is what the parties verified before they countersigned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import UNDECODABLE, IntegrityError, LineageError
from caltrain.plan import MAX_PARTIES, ManifestShard, Plan, RunManifest, check_countersignature, check_plan
from caltrain.provenance.chain import MAX_EVENTS, Event, verify_chain
from caltrain.provenance.statements import LinkedModel
from caltrain.provenance.verdict import VerdictStatement
from caltrain.records.commitment import PartyName, RecordRef
from caltrain.records.disclosure import Disclosure, check_disclosure

MAX_BUNDLE_BYTES = 256 << 20
S = TypeVar("S", TraceStatement, VerdictStatement)


class TraceBundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model user hands to an auditor. In place of a trace there may be a verdict; see `auditor.verdict`."""

    version: Literal[1] = 1
    plan: Plan
    manifest: Envelope
    countersignatures: Annotated[dict[PartyName, Envelope], msgspec.Meta(max_length=MAX_PARTIES)]
    linked: Envelope
    trace: Envelope
    chain: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=MAX_EVENTS)]
    disclosures: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=100)] = ()


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle proves. `records` holds the canonical bytes of each disclosed record."""

    plan: str
    run: str
    model: str
    trace: TraceStatement
    records: dict[RecordRef, bytes]
    undisclosed: tuple[RecordRef, ...]
    events: int
    head: str
    simulated: bool
    center_audited: bool
    audit_rate: float = 0.0
    resumes: int = 0
    front_public: bool = False
    """Training began from public weights (by the plan), so the FrontNet is no secret."""


def read_bundle(path: Path) -> TraceBundle:
    """Decode a bundle file of at most 256 MiB. Raises IntegrityError `bundle.malformed`."""
    try:
        if path.stat().st_size > MAX_BUNDLE_BYTES:
            raise msgspec.ValidationError("larger than the limit")
        return json_decoder(TraceBundle).decode(path.read_bytes())
    except (OSError, *UNDECODABLE) as error:
        raise IntegrityError(
            "bundle.malformed", f"{path} is not a trace bundle: {error}", step="read bundle", fix="Get it again."
        ) from None


def verify_bundle(bundle: TraceBundle, *, plan_digest: str, head: str | None = None) -> Verified:
    """Check a bundle against the plan's digest (and a chain head that a party kept), without network or host.

    Raises IntegrityError, LineageError, ConfigError or DataError at the first step that fails.
    """
    manifest, linked, trace, events = verify_statement(
        bundle, "trace", TraceStatement, plan_digest=plan_digest, head=head
    )
    named = {n.record: n.commitment for n in trace.neighbours}
    records = verify_disclosures(bundle, manifest, named)  # (6)
    return Verified(
        plan=manifest.plan,
        run=manifest.run,
        model=linked.model,
        trace=trace,
        records=records,
        undisclosed=tuple(n.record for n in trace.neighbours if n.record not in records),
        events=len(events),
        head=events[-1].digest(),
        simulated=manifest.simulated,
        center_audited=linked.audit_rate > 0,
        audit_rate=linked.audit_rate,
        resumes=linked.resumes,
        front_public=bundle.plan.training.initial is not None,
    )


def verify_statement(
    bundle: TraceBundle, kind: str, type_: type[S], *, plan_digest: str, head: str | None
) -> tuple[RunManifest, LinkedModel, S, tuple[Event, ...]]:
    """Steps 1 to 5: the manifest, the linked model, what the enclave stated of it in place of `trace`, the chain."""
    plan = check_plan(bundle.plan)
    if not same(plan.digest(), plan_digest):  # (1)
        raise _refuse("bundle.other-plan", f"the bundle's plan is {plan.digest()}, not {plan_digest}")
    manifest = _manifest(bundle, plan)  # (2), (3)
    key = manifest.enclave_signing_key
    linked = open_envelope(bundle.linked, "linked-model", key, LinkedModel, step="verify linked model")
    said = open_envelope(bundle.trace, kind, key, type_, step=f"verify {kind}")
    if not linked.run == said.run == manifest.run or said.model != linked.model:  # (4)
        raise _refuse("bundle.other-model", f"{kind}, link and manifest are not of one run and model")
    events = verify_chain(bundle.chain, run=manifest.run, signing_key=key, head=head)  # (5)
    _check_events(events, plan=plan, manifest=manifest, model=linked.model)
    if said.head not in {event.digest() for event in events}:
        raise _refuse("bundle.other-chain", f"the chain ends before, or forks before, the {kind} was asked for")
    return manifest, linked, said, events


def verify_disclosures(
    bundle: TraceBundle, manifest: RunManifest, named: Mapping[RecordRef, str]
) -> dict[RecordRef, bytes]:
    """Canonical bytes of the records that were disclosed, each of them `named` with its commitment."""
    return dict(_disclosed(envelope, bundle.plan, manifest, named) for envelope in bundle.disclosures)


def _manifest(bundle: TraceBundle, plan: Plan) -> RunManifest:
    # Read with the key that it claims; that key counts only once every party has countersigned the content.
    manifest = open_envelope(
        bundle.manifest, "run-manifest", bundle.manifest.signer, RunManifest, step="verify manifest"
    )
    named = (manifest.plan, manifest.measurement, manifest.enclave_signing_key)
    if named != (plan.digest(), plan.enclave.measurement, bundle.manifest.signer):
        raise _refuse(
            "bundle.other-manifest", "the manifest is of another plan or program, or not signed by its enclave"
        )
    for party in plan.parties:
        envelope = bundle.countersignatures.get(party.name)
        if envelope is None:
            raise _refuse("bundle.not-countersigned", f"{party.name} has not countersigned the manifest")
        check_countersignature(plan, manifest, party.name, envelope)
    return manifest


def _check_events(events: tuple[Event, ...], *, plan: Plan, manifest: RunManifest, model: str) -> None:
    for kind, key, value in (
        ("plan", "plan", plan.digest()),
        ("manifest", "manifest", manifest.digest()),
        ("link", "model", model),
    ):
        if not any(event.kind == kind and event.body.get(key) == value for event in events):
            raise _refuse("bundle.not-in-chain", f"the chain has no event {kind} for {value}")


def _disclosed(
    envelope: Envelope, plan: Plan, manifest: RunManifest, named: Mapping[RecordRef, str]
) -> tuple[RecordRef, bytes]:
    owner = next((p for p in plan.parties if p.public_key == envelope.signer), None)
    if owner is None:
        raise _refuse("disclosure.unknown-signer", "a disclosure is signed by no party of the plan")
    disclosure = open_envelope(envelope, "disclosure", owner.public_key, Disclosure, step="verify disclosure")
    reference = disclosure.record_ref
    commitment = named.get(reference)
    if commitment is None or reference.party != owner.name:
        raise _refuse("disclosure.not-traced", f"the trace names no such record of {owner.name}")
    shard = _shard(manifest, reference)
    record = check_disclosure(disclosure, root=shard.root, records=shard.records, commitment=commitment)
    return reference, record


def _shard(manifest: RunManifest, reference: RecordRef) -> ManifestShard:
    for party in manifest.parties:
        for shard in party.shards:
            if (party.name, shard.shard) == (reference.party, reference.shard):
                return shard
    raise _refuse("disclosure.not-in-manifest", f"the manifest has no shard {reference.shard} of {reference.party}")


def _refuse(code: str, what: str) -> LineageError:
    return LineageError(
        code, what, step="verify bundle", fix="Do not rely on this bundle; get it again from its owner."
    )
