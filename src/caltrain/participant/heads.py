"""How far a party has followed a run: the newest head of its chain that it has verified itself.

A kept head proves that the run was at that place. A chain that the host shows later must pass through it; one that
does not was cut back or forked behind it, so a host that restores an old copy of its folder is found out by every
party that looked after the copy was made. It proves nothing about what came after the last look: a party that has not
looked since cannot tell an old copy from the newest, and one of a quorum that did is enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, envelope_from_json, open_envelope
from caltrain.errors import IntegrityError, LineageError
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.identity import Identity
from caltrain.participant.journal import KeptRun, keep_run, kept_run
from caltrain.plan import Plan, RunManifest
from caltrain.provenance.chain import Event, empty_head, verify_chain

MAX_CHAIN_BYTES = 1 << 28
_STEP = "look at the chain"
_REST = 50
"""After a look there is none for so many times as long as it took: two per cent of one core at most."""


def known_run(identity: Identity, run: str) -> KeptRun:
    """What this party kept of the run. Raises LineageError `run.unknown`."""
    kept = kept_run(identity.folder, run)
    if kept is None:
        raise LineageError(
            "run.unknown",
            f"{identity.name} has countersigned no run {run}",
            step=_STEP,
            fix="Use the folder of the party that joined this run, or ask the operator which run this is.",
        )
    return kept


def shown_manifest(host: HostClient, *, step: str) -> RunManifest:
    """The manifest of the host's run, under the key that it claims. That it is ours, `check_ours` says."""
    signed = host.get("/v1/manifest", Envelope)
    return open_envelope(signed, "run-manifest", signed.signer, RunManifest, step=step)


def check_ours(manifest: RunManifest, plan: Plan, identity: Identity) -> None:
    """Check that this party countersigned that manifest for this plan.

    Raises LineageError `run.unknown`, IntegrityError `rejoin.other-manifest`.
    """
    kept = known_run(identity, manifest.run)
    if not same(manifest.digest(), kept.manifest) or manifest.plan != plan.digest():
        raise IntegrityError(
            "rejoin.other-manifest",
            f"the host shows the manifest {manifest.digest()}, {identity.name} countersigned {kept.manifest}",
            step="compare manifests",
            fix="Give no word: this is not the run, or not the plan, that was agreed on.",
        )


def look(host: HostClient, identity: Identity, run: str) -> tuple[Event, ...]:
    """Fetch the chain, verify it up to its end and through our kept head, and keep its end as the new one.

    Raises LineageError `run.unknown`, `chain.rolled-back`, `chain.forked` or `chain.broken`, IntegrityError; then the
    kept head stays.
    """
    kept = known_run(identity, run)
    raw = host.artifact("chain.jsonl", limit=MAX_CHAIN_BYTES)
    envelopes = [envelope_from_json(line, step=_STEP) for line in raw.splitlines()]
    events = verify_chain(envelopes, run=run, signing_key=kept.signing_key)
    if len(events) < kept.events:
        raise _turned_back(
            "chain.rolled-back", f"the chain ends after {len(events)} events; {identity.name} has seen {kept.events}"
        )
    if kept.events and not same(events[kept.events - 1].digest(), kept.head):
        raise _turned_back("chain.forked", f"another event stands where {identity.name} saw the {kept.events}th")
    head = events[-1].digest() if events else empty_head(run)
    keep_run(identity.folder, run, msgspec.structs.replace(kept, head=head, events=len(events), words=0))
    return events


class Lookout:
    """Looks at the chain whenever the host's status shows another phase or epoch, but not all the time."""

    def __init__(
        self, host: HostClient, identity: Identity, run: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._host, self._identity, self._run, self._clock = host, identity, run, clock
        self._place: tuple[str, int] | None = None
        self._rests_until = 0.0

    def __call__(self, status: RunStatus) -> None:
        """Look, if there is reason to."""
        place, began = (status.phase, status.epoch), self._clock()
        if place == self._place or began < self._rests_until:
            return
        look(self._host, self._identity, self._run)
        self._place, now = place, self._clock()
        self._rests_until = now + _REST * (now - began)


def _turned_back(code: str, what: str) -> LineageError:
    return LineageError(
        code,
        f"the host shows an older or another course of the run: {what}",
        step=_STEP,
        fix="Give no word for it. Have the operator restore the newest copy of the host's folder; tell the others.",
    )
