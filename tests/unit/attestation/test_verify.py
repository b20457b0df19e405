"""Appraisal: evidence for exactly this enclave, purpose, plan and nonce, or a refusal."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.attestation.evidence import Binding, Evidence, EvidenceBundle
from caltrain.attestation.simulated import SimulatedAttester, SimulatedQuote
from caltrain.attestation.verify import Claims, Policy, verify_evidence
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.errors import AttestationError
from support.samples import MEASUREMENT, flips, quick, refused, signer

NOW = datetime(2030, 1, 1, tzinfo=UTC)
ROOT, OTHER = signer("development root"), signer("another root")
PLAN, OTHER_PLAN = "sha256:" + "12" * 32, "sha256:" + "13" * 32
NONCE, OTHER_NONCE = "34" * 32, "35" * 32
POLICY = Policy(measurements=(MEASUREMENT,), allow_simulated=True, simulated_roots=(ROOT.public,))
BINDING = Binding(
    purpose="training", encryption_key="xwing:AAAA", signing_key=signer("enclave").public, plan=PLAN, nonce=NONCE
)


def bundle(*, root: SigningKey = ROOT, measurement: str = MEASUREMENT, **changes: Any) -> EvidenceBundle:
    """Evidence of an enclave for a binding."""
    binding = msgspec.structs.replace(BINDING, **changes)
    evidence = SimulatedAttester(root, measurement=measurement).evidence(binding.report_data())
    return EvidenceBundle(binding=binding, evidence=evidence)


def rebound(honest: EvidenceBundle, **changes: Any) -> EvidenceBundle:
    """The same evidence under a changed binding."""
    return msgspec.structs.replace(honest, binding=msgspec.structs.replace(honest.binding, **changes))


def with_blob(blob: str) -> EvidenceBundle:
    return EvidenceBundle(binding=BINDING, evidence=Evidence(kind="simulated", blob=blob))


def quoted(value: object, *, kind: str = "simulated-quote") -> EvidenceBundle:
    """A quote of any content, signed by the root that the policy names."""
    return with_blob(base64.b64encode(msgspec.json.encode(ROOT.sign(kind, value))).decode())


def verify(evidence: EvidenceBundle, policy: Policy = POLICY, **changes: Any) -> Claims:
    expected: dict[str, Any] = {"purpose": "training", "plan": PLAN, "nonce": NONCE, "now": NOW}
    return verify_evidence(evidence, policy, **(expected | changes))


def test_known_evidence() -> None:
    blob = bundle().evidence.blob.encode()
    assert hashlib.sha256(blob).hexdigest() == "271bda8d0ca4e2fe45039b324e1803125953f8e8964adf4a161691e223a62edc"


def test_evidence_for_our_nonce_plan_and_purpose_is_accepted() -> None:
    assert verify(bundle()) == Claims(
        kind="simulated", simulated=True, measurement=MEASUREMENT, report_data=BINDING.report_data()
    )


def test_a_bundle_crosses_a_wire_whole() -> None:
    assert msgspec.json.decode(msgspec.json.encode(bundle()), type=EvidenceBundle) == bundle()


def test_one_of_several_measurements_and_roots_is_enough() -> None:
    wide = Policy(
        measurements=("sha384:" + "0" * 96, MEASUREMENT),
        allow_simulated=True,
        simulated_roots=(OTHER.public, ROOT.public),
    )
    assert verify(bundle(), wide).simulated


NOT_TRUSTED = Policy(measurements=(MEASUREMENT,), simulated_roots=(ROOT.public,))
NO_ROOTS = Policy(measurements=(MEASUREMENT,), allow_simulated=True)
OTHER_ROOTS = Policy(measurements=(MEASUREMENT,), allow_simulated=True, simulated_roots=(OTHER.public,))
OTHER_PROGRAM = Policy(measurements=("sha384:" + "0" * 96,), allow_simulated=True, simulated_roots=(ROOT.public,))

REFUSED: dict[str, tuple[EvidenceBundle, Policy, str]] = {
    "for another purpose": (bundle(purpose="query"), POLICY, "evidence.other-purpose"),
    "for another plan": (bundle(plan=OTHER_PLAN), POLICY, "evidence.other-plan"),
    "for another nonce": (bundle(nonce=OTHER_NONCE), POLICY, "evidence.other-nonce"),
    "old evidence renamed to our purpose": (
        rebound(bundle(purpose="query"), purpose="training"),
        POLICY,
        "evidence.other-key",
    ),
    "old evidence renamed to our plan": (rebound(bundle(plan=OTHER_PLAN), plan=PLAN), POLICY, "evidence.other-key"),
    "old evidence renamed to our nonce": (
        rebound(bundle(nonce=OTHER_NONCE), nonce=NONCE),
        POLICY,
        "evidence.other-key",
    ),
    "another encryption key": (rebound(bundle(), encryption_key="xwing:AAAB"), POLICY, "evidence.other-key"),
    "another signing key": (rebound(bundle(), signing_key=OTHER.public), POLICY, "evidence.other-key"),
    "another program": (bundle(measurement="sha384:" + "0" * 96), POLICY, "evidence.other-measurement"),
    "a program that the policy does not name": (bundle(), OTHER_PROGRAM, "evidence.other-measurement"),
    "simulated where that is not allowed": (bundle(), NOT_TRUSTED, "evidence.simulated"),
    "a root where none is named": (bundle(), NO_ROOTS, "evidence.unknown-root"),
    "a root that is not named": (bundle(), OTHER_ROOTS, "evidence.unknown-root"),
    "a root of the attacker's": (bundle(root=OTHER), POLICY, "evidence.unknown-root"),
    "a technology without a verifier": (
        msgspec.structs.replace(bundle(), evidence=Evidence(kind="tdx", blob="AAAA")),
        POLICY,
        "evidence.unknown-kind",
    ),
    "not base64": (with_blob("?"), POLICY, "evidence.malformed"),
    "not ASCII": (with_blob("é"), POLICY, "evidence.malformed"),
    "no blob": (with_blob(""), POLICY, "evidence.malformed"),
    "no envelope": (with_blob("AAAA"), POLICY, "evidence.malformed"),
    "signed as something else": (
        quoted(SimulatedQuote(measurement=MEASUREMENT, report_data=""), kind="plan-approval"),
        POLICY,
        "evidence.malformed",
    ),
    "report data not hexadecimal": (
        quoted(SimulatedQuote(measurement=MEASUREMENT, report_data="x")),
        POLICY,
        "evidence.malformed",
    ),
    "no report data": (quoted(SimulatedQuote(measurement=MEASUREMENT, report_data="")), POLICY, "evidence.other-key"),
    "report data cut": (
        quoted(SimulatedQuote(measurement=MEASUREMENT, report_data=BINDING.report_data()[:32].hex())),
        POLICY,
        "evidence.other-key",
    ),
    "no measurement": (quoted({"report_data": ""}), POLICY, "evidence.malformed"),
    "measurement of another form": (quoted({"measurement": "x", "report_data": ""}), POLICY, "evidence.malformed"),
}


@pytest.mark.parametrize(("evidence", "policy", "code"), REFUSED.values(), ids=REFUSED)
def test_any_other_evidence_is_refused(evidence: EvidenceBundle, policy: Policy, code: str) -> None:
    with refused(AttestationError, code):
        verify(evidence, policy)


def test_evidence_is_refused_for_anything_but_what_it_was_made_for() -> None:
    with refused(AttestationError, "evidence.other-purpose"):
        verify(bundle(), purpose="query")
    with refused(AttestationError, "evidence.other-plan"):
        verify(bundle(), plan=OTHER_PLAN)
    with refused(AttestationError, "evidence.other-nonce"):
        verify(bundle(), nonce=OTHER_NONCE)


def test_every_flipped_bit_of_a_quote_is_refused() -> None:
    for changed in flips(base64.b64decode(bundle().evidence.blob)):
        with pytest.raises(AttestationError) as caught:
            verify(with_blob(base64.b64encode(changed).decode()))
        assert caught.value.code in {"evidence.malformed", "evidence.unknown-root"}


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=100) | st.binary(max_size=100))
def test_any_other_blob_is_refused(blob: str | bytes) -> None:
    with refused(AttestationError, "evidence.malformed"):
        verify(with_blob(blob if isinstance(blob, str) else base64.b64encode(blob).decode()))


def test_a_policy_trusts_no_measurement_no_root_and_no_simulation_by_default() -> None:
    no_policies: list[dict[str, Any]] = [{}, {"measurements": []}, {"measurements": ["sha256:" + "0" * 64]}]
    for fields in no_policies:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(fields, Policy)
    policy = msgspec.convert({"measurements": [MEASUREMENT]}, Policy)
    assert not policy.allow_simulated
    assert policy.simulated_roots == ()


def test_simulated_evidence_says_so() -> None:
    attester = SimulatedAttester(ROOT, measurement=MEASUREMENT)
    assert (attester.kind, attester.simulated) == ("simulated", True)
    evidence = attester.evidence(bytes(64))
    assert evidence.kind == "simulated"
    envelope = msgspec.json.decode(base64.b64decode(evidence.blob), type=Envelope)
    assert envelope.signer == ROOT.public
