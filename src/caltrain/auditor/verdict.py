"""A bundle with a verdict in place of a trace: the same steps, from the plan's digest to the records disclosed.

What it proves: this enclave, of this run, gave this verdict on inputs of this commitment; which contributors and
records it names; and that a record that was disclosed is the one that it names. Whether the method is right, no
signature tells: that is measured (docs/accountability.md).
"""

from __future__ import annotations

import msgspec

from caltrain.auditor.bundle import TraceBundle, verify_disclosures, verify_statement
from caltrain.provenance.verdict import VerdictStatement
from caltrain.records.commitment import RecordRef


class VerifiedVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What such a bundle proves. `records` holds the canonical bytes of each disclosed record."""

    plan: str
    run: str
    model: str
    verdict: VerdictStatement
    records: dict[RecordRef, bytes]
    events: int
    head: str
    simulated: bool
    audit_rate: float
    resumes: int
    front_public: bool

    @property
    def center_audited(self) -> bool:
        """Whether any of the center's steps were repeated inside."""
        return self.audit_rate > 0


def verify_verdict(bundle: TraceBundle, *, plan_digest: str, head: str | None = None) -> VerifiedVerdict:
    """Check it against the plan's digest (and a chain head that a party kept), without network or host.

    Raises IntegrityError, LineageError, ConfigError or DataError at the first step that fails.
    """
    manifest, linked, verdict, events = verify_statement(
        bundle, "verdict", VerdictStatement, plan_digest=plan_digest, head=head
    )
    return VerifiedVerdict(
        plan=manifest.plan,
        run=manifest.run,
        model=linked.model,
        verdict=verdict,
        records=verify_disclosures(bundle, manifest, verdict.records()),
        events=len(events),
        head=events[-1].digest(),
        simulated=manifest.simulated,
        audit_rate=linked.audit_rate,
        resumes=linked.resumes,
        front_public=bundle.plan.training.initial is not None,
    )
