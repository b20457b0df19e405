"""Give a run that was interrupted this party's word that it may go on in another enclave.

(1) the host asks for it: the run is in phase `resume` and waits for this party
(2) the manifest that the host shows is the one that this party countersigned for this plan
(3) fresh nonce -> evidence for the purpose `resume` -> our policy, and the plan's program
(4) the chain verifies under the signing key of that manifest, passes through the newest head that this party has kept,
    and holds a checkpoint
(5) only then: the word is counted in the party's folder, and leaves: data key, run and the chain's head, sealed to the
    new enclave and signed

What that proves. The enclave goes on only from the chain's end that a quorum signed, and only from the checkpoint that
this chain names last; so the host can neither turn the run back behind the head that any signing party has kept, nor
fork it, nor have an earlier word serve for another restart. What it does not prove: a party that has not looked at the
chain since (see `heads`) cannot notice that it is shown an older one. `party join` looks while it waits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.verify import Policy, match_plan, verify_evidence
from caltrain.boundary.sealed import ResumeSecret, seal_message
from caltrain.errors import LineageError, ProtocolError
from caltrain.host_client import HostClient
from caltrain.participant.heads import check_ours, look, shown_manifest
from caltrain.participant.identity import Identity
from caltrain.participant.join import check_named
from caltrain.participant.journal import count_word
from caltrain.plan import Plan
from caltrain.provenance.chain import Event

_STEP = "rejoin"
_GOES_ON = {"start", "ingest", "assess", "train", "cut", "hunt", "release", "link", "linked"}


@dataclass(frozen=True)
class Rejoined:
    """The word that was given: for which place of which run. `at` is the (epoch, step) that training goes on from.

    `resumed` counts earlier restarts: each may have repeated steps. `stopped` says why the enclave ended before, where
    it did so by itself. `words` counts this party's words for this very head: where it is more than 1, an enclave that
    got an earlier one may still live.
    """

    run: str
    head: str
    events: int
    at: tuple[int, int] | None
    resumed: int
    stopped: tuple[str, ...]
    words: int
    simulated: bool


def rejoin(
    host: HostClient,
    plan: Plan,
    identity: Identity,
    policy: Policy,
    *,
    clock: Callable[[], datetime],
    seconds: float = 3600,
) -> Rejoined | None:
    """All five steps; None where the host waits for no word of this party's (it has it already, or the run goes on).

    Raises before anything is sent: AttestationError, ProvisioningError `plan.other-key`, ProtocolError
    `rejoin.not-asked`, LineageError `run.unknown`, `chain.rolled-back`, `chain.forked`, `chain.broken` or
    `rejoin.nothing`, IntegrityError `rejoin.other-manifest` or `signature.invalid`.
    """
    check_named(plan, identity)
    status = host.wait_for({"resume", "approvals", "provisioning", "countersignatures"} | _GOES_ON, seconds=seconds)
    if status.phase in _GOES_ON or (status.phase == "resume" and identity.name not in status.waiting_for):
        return None
    if status.phase != "resume":
        raise ProtocolError(
            "rejoin.not-asked",
            f"the host does not take up a run, it is in phase {status.phase!r}",
            step=_STEP,
            fix="Have the operator serve the run's folder with --resume.",
        )
    run = same_run(host, plan, identity)
    nonce = os.urandom(32).hex()
    bundle = host.get("/v1/attestation", EvidenceBundle, params={"purpose": "resume", "nonce": nonce})
    claims = verify_evidence(bundle, policy, purpose="resume", plan=plan.digest(), nonce=nonce, now=clock())
    match_plan(claims.measurement, plan)
    events = look(host, identity, run)
    at = _checkpoint(events)
    head = events[-1].digest()
    word = ResumeSecret(data_key=identity.data_key, run=run, head=head)
    envelope = seal_message("rejoin", word, binding=bundle.binding, sender=identity.name, signer=identity.signer)
    words = count_word(identity.folder, run, head=head)
    host.post(f"/v1/parties/{identity.name}/rejoin", envelope, dict[str, Any])
    return Rejoined(
        run=run,
        head=head,
        events=len(events),
        at=at,
        resumed=sum(event.kind == "resume" for event in events),
        stopped=tuple(str(event.body.get("code")) for event in events if event.kind == "stopped"),
        words=words,
        simulated=claims.simulated,
    )


def same_run(host: HostClient, plan: Plan, identity: Identity) -> str:
    """Id of the run whose manifest the host shows, once it is one that this party countersigned for this plan."""
    manifest = shown_manifest(host, step=_STEP)
    check_ours(manifest, plan, identity)
    return manifest.run


def _checkpoint(events: tuple[Event, ...]) -> tuple[int, int] | None:
    """Where the chain's last checkpoint goes on; None before training."""
    bodies = [event.body for event in events if event.kind == "checkpoint"]
    if not bodies:
        raise LineageError(
            "rejoin.nothing",
            "the chain holds no checkpoint from which the run could go on",
            step=_STEP,
            fix="Have the operator start the run anew, and join it.",
        )
    return (int(bodies[-1]["epoch"]), int(bodies[-1]["step"])) if "epoch" in bodies[-1] else None
