"""Gather a trace bundle from what the host publishes; nothing in it is believed before `verify_bundle`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.auditor.bundle import MAX_BUNDLE_BYTES, TraceBundle
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, envelope_from_json
from caltrain.host_client import HostClient
from caltrain.plan import Plan

_STEP = "collect bundle"


def collect_bundle(
    host: HostClient, plan: Plan, trace: Envelope, *, evidence: EvidenceBundle, disclosures: Sequence[Envelope] = ()
) -> TraceBundle:
    """A bundle for one trace and the evidence that the user had for it, from the run's public artifacts.

    Raises IntegrityError, or the host's error.
    """
    chain = host.artifact("chain.jsonl", limit=MAX_BUNDLE_BYTES).splitlines()
    return TraceBundle(
        plan=plan,
        manifest=host.get("/v1/manifest", Envelope),
        countersignatures={p.name: _envelope(host, f"countersignatures/{p.name}.json") for p in plan.parties},
        linked=_envelope(host, "suspicion.json"),
        trace=trace,
        evidence=evidence,
        chain=tuple(envelope_from_json(line, step=_STEP) for line in chain),
        disclosures=tuple(disclosures),
    )


def _envelope(host: HostClient, name: str) -> Envelope:
    return envelope_from_json(host.artifact(name, limit=MAX_ENVELOPE_BYTES), step=_STEP)


def encode_bundle(bundle: TraceBundle) -> bytes:
    """The bundle as a file."""
    return msgspec.json.encode(bundle)
