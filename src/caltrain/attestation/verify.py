"""Appraisal of evidence: one policy, one verifier for each technology, verified claims or an AttestationError.

What `verify_evidence` does, in this order:
  (1) the policy allows the technology;  (2) the binding is the expected one: purpose, plan, nonce;
  (3) the technology's verifier checks the signature chain against the policy's anchors, at `now`;
  (4) the signed report data equals the digest of the binding;  (5) the measurement is one that the policy names.
It does not check that a nonce is fresh: the caller draws it for this one request.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Protocol

import msgspec

from caltrain.attestation.evidence import EvidenceBundle, Purpose
from caltrain.attestation.simulated import KIND as SIMULATED
from caltrain.attestation.simulated import SimulatedQuote
from caltrain.crypto import dsse
from caltrain.crypto.digests import same
from caltrain.errors import AttestationError, IntegrityError
from caltrain.plan import Measurement, Plan


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a relying party accepts. There is no default measurement and no default root."""

    measurements: Annotated[tuple[Measurement, ...], msgspec.Meta(min_length=1, max_length=64)]
    allow_simulated: bool = False
    simulated_roots: Annotated[tuple[dsse.PublicKey, ...], msgspec.Meta(max_length=16)] = ()


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """What verified evidence says."""

    kind: str
    simulated: bool
    measurement: str
    report_data: bytes


class Verifier(Protocol):
    """Checks one technology's signatures and returns what was signed."""

    def __call__(self, bundle: EvidenceBundle, policy: Policy, *, collateral: bytes, now: datetime) -> Claims:
        """Raise AttestationError, or return the claims. `collateral` is the technology's own bundle of CRLs etc."""


def _refuse(code: str, what: str, fix: str) -> AttestationError:
    return AttestationError(code, what, step="verify evidence", fix=fix)


def verify_simulated(bundle: EvidenceBundle, policy: Policy, *, collateral: bytes, now: datetime) -> Claims:
    """Verifier of simulated evidence. It has no collateral and no validity period; both arguments go unused."""
    del collateral, now
    if not policy.allow_simulated:
        raise _refuse(
            "evidence.simulated",
            "the enclave is simulated: its operator can read all that it holds",
            "Refuse it; only for a trial, say allow_simulated = true in the policy.",
        )
    try:
        raw = base64.b64decode(bundle.evidence.blob, validate=True)
        envelope = dsse.envelope_from_json(raw, step="read simulated quote")
        if envelope.signer not in policy.simulated_roots:
            raise _refuse(
                "evidence.unknown-root",
                "the simulated quote is signed by a root that the policy does not name",
                "Compare the development root with the operator's and put it under simulated_roots.",
            )
        quote = dsse.open_envelope(
            envelope, "simulated-quote", envelope.signer, SimulatedQuote, step="verify simulated quote"
        )
        report_data = bytes.fromhex(quote.report_data)
    except (IntegrityError, binascii.Error, ValueError) as error:
        raise _refuse("evidence.malformed", f"the evidence cannot be read: {error}", "Refuse this enclave.") from None
    return Claims(kind=SIMULATED, simulated=True, measurement=quote.measurement, report_data=report_data)


VERIFIERS: Mapping[str, Verifier] = {SIMULATED: verify_simulated}


def match_plan(measurement: str, plan: Plan) -> None:
    """Raise AttestationError `evidence.not-the-plans` unless the plan names this measurement.

    A policy may accept several programs; a run is of the one that all parties agreed on.
    """
    if measurement != plan.enclave.measurement:
        raise _refuse(
            "evidence.not-the-plans",
            f"the enclave runs {measurement}, the plan names {plan.enclave.measurement}",
            "Refuse this enclave: its operator started another program than the one that was agreed on.",
        )


def verify_evidence(
    bundle: EvidenceBundle,
    policy: Policy,
    *,
    purpose: Purpose,
    plan: str,
    nonce: str,
    now: datetime,
    collateral: bytes = b"",
) -> Claims:
    """Appraise `bundle` as the answer to our `nonce` for `purpose` and plan digest `plan`."""
    verifier = VERIFIERS.get(bundle.evidence.kind)
    if verifier is None:
        raise _refuse(
            "evidence.unknown-kind",
            f"no verifier for evidence of kind {bundle.evidence.kind!r}",
            f"Known kinds: {', '.join(sorted(VERIFIERS))}.",
        )
    for code, what, got, expected in (
        ("evidence.other-purpose", "purpose", bundle.binding.purpose, purpose),
        ("evidence.other-plan", "plan", bundle.binding.plan, plan),
        ("evidence.other-nonce", "nonce", bundle.binding.nonce, nonce),
    ):
        if not same(got, expected):
            raise _refuse(code, f"the evidence is for another {what}", "Ask for evidence again; refuse if it repeats.")
    claims = verifier(bundle, policy, collateral=collateral, now=now)
    if not same(claims.report_data, bundle.binding.report_data()):
        raise _refuse(
            "evidence.other-key",
            "the evidence does not cover the keys, plan, purpose and nonce that came with it",
            "Refuse this enclave: somebody stands between it and you.",
        )
    if claims.measurement not in policy.measurements:
        raise _refuse(
            "evidence.other-measurement",
            f"the enclave runs {claims.measurement}, which the policy does not name",
            "Build the program from its source, measure it (`caltrain doctor`), and name it only if you trust it.",
        )
    return claims
