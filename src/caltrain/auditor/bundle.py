"""A trace bundle: all that a third party needs to check a trace (or verdict) and its disclosures, and the check.

Trust anchors are the plan's digest, which the auditor knows from elsewhere (each party can tell it), and a policy:
which enclave programs and whose evidence the auditor accepts. From there:
  (1) the bundle's plan has that digest, so its keys are the parties' keys;
  (2) every party countersigned the manifest, so its enclave keys and shard roots are what all of them verified;
  (3) the manifest and the linked model are signed by that enclave, which says of a repair what the plan says;
  (4) the trace is signed by it, and is of the linked model;
  (5) the chain is whole, signed, holds plan, manifest, repair and link, and the question of this trace where it was
      asked;
  (6) the evidence that the user had asked for is of that enclave, for this plan and question; with a policy it is
      appraised, and its measurement is the plan's;
  (7) each disclosure or refusal is signed by its contributor and answers this trace (`contest`).
Without a policy it does not show that the enclave was genuine: that is what the parties verified before they signed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Required, TypedDict, TypeVar, Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.verify import Policy, match_plan, verify_evidence
from caltrain.auditor.contest import Decision, decide
from caltrain.boundary.sealed import TraceStatement, commit_input
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import UNDECODABLE, IntegrityError, LineageError
from caltrain.plan import MAX_PARTIES, Plan, RunManifest, check_countersignature, check_plan
from caltrain.provenance.chain import MAX_EVENTS, Event, verify_chain
from caltrain.provenance.statements import LinkedModel
from caltrain.provenance.verdict import VerdictStatement
from caltrain.records.commitment import PartyName, RecordRef
from caltrain.records.quarantine import Repair
from caltrain.records.shown import Reading

MAX_BUNDLE_BYTES = 256 << 20
S = TypeVar("S", TraceStatement, VerdictStatement)
_now = partial(datetime.now, UTC)


class Anchors(TypedDict, total=False):
    """What an auditor goes by.

    The plan's digest, a head of the chain that a party kept, a policy for the enclave's evidence, a key to open what is
    disclosed to its reader alone; the time.
    """

    plan_digest: Required[str]
    head: str | None
    policy: Policy | None
    reading: Reading | None
    clock: Callable[[], datetime]


class TraceBundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a model user hands to an auditor. In place of a trace there may be a verdict; see `auditor.verdict`."""

    version: Literal[1] = 1
    plan: Plan
    manifest: Envelope
    countersignatures: Annotated[dict[PartyName, Envelope], msgspec.Meta(max_length=MAX_PARTIES)]
    linked: Envelope
    trace: Envelope
    evidence: EvidenceBundle
    """What the enclave showed the user before the question was sealed to it."""
    chain: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=MAX_EVENTS)]
    disclosures: Annotated[tuple[Envelope, ...], msgspec.Meta(max_length=100)] = ()


class Proved(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle proves besides the statement in it, and what contributors answered for the records that it names.

    `appraised`: the enclave's evidence was accepted by the auditor's own policy.
    """

    plan: str
    run: str
    model: str
    decisions: tuple[Decision, ...]
    events: int
    head: str
    simulated: bool
    appraised: bool
    audit_rate: float
    resumes: int
    front_public: bool
    """Training began from public weights (by the plan), so the FrontNet is no secret."""
    repair: Repair | None
    """Which model this one replaces, and the list of records that it was trained without; see `left_out`."""

    @property
    def center_audited(self) -> bool:
        """Whether any of the center's steps were repeated inside."""
        return self.audit_rate > 0

    @property
    def records(self) -> dict[RecordRef, bytes]:
        """Canonical bytes of each record that was laid open and is the one that was trained on."""
        return {d.record: d.content for d in self.decisions if d.outcome == "disclosed"}

    @property
    def undisclosed(self) -> tuple[RecordRef, ...]:
        """Records that were not laid open to this reader, refused ones among them."""
        return tuple(d.record for d in self.decisions if d.outcome != "disclosed")

    def sound(self) -> None:
        """Raise the first fault that a contributor has signed."""
        for decision in self.decisions:
            if decision.fault is not None:
                raise decision.fault


class Verified(Proved, frozen=True, kw_only=True):
    """What a bundle with a trace proves."""

    trace: TraceStatement

    @property
    def named(self) -> dict[RecordRef, str]:
        """Records that it names, with their commitments."""
        return self.trace.records()


def read_bundle(path: Path) -> TraceBundle:
    """Decode a bundle file of at most 256 MiB. Raises IntegrityError `bundle.malformed`."""
    try:
        if path.stat().st_size > MAX_BUNDLE_BYTES:
            raise msgspec.ValidationError("larger than the limit")
        return json_decoder(TraceBundle).decode(path.read_bytes())
    except (OSError, *UNDECODABLE) as error:
        raise IntegrityError(
            "bundle.malformed",
            f"{path} is not a bundle: {error}",
            step="read bundle",
            fix="Give a bundle file that trace or verdict wrote with --out; if it is one, get it again.",
        ) from None


def verify_bundle(bundle: TraceBundle, **anchors: Unpack[Anchors]) -> Verified:
    """Check a bundle against these anchors, without network or host.

    Raises IntegrityError, LineageError, ConfigError, DataError, AccessError or (with a policy) AttestationError at the
    first step that fails.
    """
    verified = judge_bundle(bundle, **anchors)
    verified.sound()
    return verified


def judge_bundle(bundle: TraceBundle, **anchors: Unpack[Anchors]) -> Verified:
    """As `verify_bundle`, but what a contributor signed in vain is a decision about its record, not an error."""
    trace, proved = prove(bundle, "trace", TraceStatement, **anchors)
    return Verified(trace=trace, **msgspec.structs.asdict(proved))


def prove(
    bundle: TraceBundle,
    kind: str,
    type_: type[S],
    *,
    plan_digest: str,
    head: str | None = None,
    policy: Policy | None = None,
    reading: Reading | None = None,
    clock: Callable[[], datetime] = _now,
) -> tuple[S, Proved]:
    """All steps, whatever the enclave stated in place of `trace`: that statement, and what is proved besides."""
    plan = check_plan(bundle.plan)
    if not same(plan.digest(), plan_digest):  # (1)
        raise _refuse("bundle.other-plan", f"the bundle's plan is {plan.digest()}, not {plan_digest}")
    manifest = _manifest(bundle, plan)  # (2), (3)
    key = manifest.enclave_signing_key
    linked = open_envelope(bundle.linked, "linked-model", key, LinkedModel, step="verify linked model")
    said = open_envelope(bundle.trace, kind, key, type_, step=f"verify {kind}")
    if not linked.run == said.run == manifest.run or said.model != linked.model:  # (4)
        raise _refuse("bundle.other-model", f"{kind}, link and manifest are not of one run and model")
    if linked.repair != (plan.repair or None):
        raise _refuse("bundle.other-repair", "the enclave does not say of the repair what the plan says")
    events = verify_chain(bundle.chain, run=manifest.run, signing_key=key, head=head)  # (5)
    _check_events(events, plan=plan, manifest=manifest, model=linked.model)
    asked = next((event for event in events if event.previous == said.head), None)
    if asked is None or (asked.kind, asked.body.get("user"), asked.body.get("model")) != (
        "query",
        said.user,
        said.model,
    ):
        raise _refuse("bundle.other-chain", f"the chain does not hold the question of this {kind} where it was asked")
    _check_evidence(bundle.evidence, plan, said.nonce, key=key, policy=policy, now=clock())  # (6)
    answers = decide(bundle.disclosures, plan, manifest, said.records(), model=said.model, reading=reading)  # (7)
    return said, Proved(
        plan=plan.digest(),
        run=manifest.run,
        model=linked.model,
        decisions=answers,
        events=len(events),
        head=events[-1].digest(),
        simulated=manifest.simulated,
        appraised=policy is not None,
        audit_rate=linked.audit_rate,
        resumes=linked.resumes,
        front_public=plan.training.initial is not None,
        repair=linked.repair,
    )


def check_input(verified: Verified, inputs: NDArray[np.generic]) -> int:
    """Which of the inputs (N, C, H, W) the trace is of: its user shows it. Raises LineageError `bundle.other-input`."""
    trace = verified.trace
    for index, each in enumerate(inputs):
        if same(commit_input(trace.nonce, np.ascontiguousarray(each).tobytes()), trace.input_commitment):
            return index
    raise _refuse("bundle.other-input", f"the trace is of none of these {len(inputs)} inputs")


def _check_evidence(
    evidence: EvidenceBundle, plan: Plan, nonce: str, *, key: str, policy: Policy | None, now: datetime
) -> None:
    binding = evidence.binding
    if (binding.purpose, binding.plan, binding.nonce, binding.signing_key) != ("query", plan.digest(), nonce, key):
        raise _refuse("bundle.other-evidence", "the evidence is not of this enclave, plan and question")
    if policy is not None:
        claims = verify_evidence(evidence, policy, purpose="query", plan=plan.digest(), nonce=nonce, now=now)
        match_plan(claims.measurement, plan)


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
    due = [("plan", "plan", plan.digest()), ("manifest", "manifest", manifest.digest()), ("link", "model", model)]
    if plan.repair:
        due.append(("repair", "quarantine", plan.repair.quarantine))
    for kind, key, value in due:
        if not any(event.kind == kind and event.body.get(key) == value for event in events):
            raise _refuse("bundle.not-in-chain", f"the chain has no event {kind} for {value}")


def _refuse(code: str, what: str) -> LineageError:
    return LineageError(
        code, what, step="verify bundle", fix="Do not rely on this bundle; get it again from its owner."
    )
