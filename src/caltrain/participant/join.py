"""Take part in a run: approve, upload, verify the enclave, provision, countersign, receive the model.

(1) no other manifest of this plan was signed before, or a second one is allowed; the host's plan is the one we hold
(2) send approval and sealed shards
(3) fresh nonce -> evidence -> our policy
(4) only then: data key and entropy, sealed
(5) the manifest has our shards, every party, the attested keys
(6) no other manifest of this plan was signed: countersign
(7) wait for the run, through deaths of host and enclave, keeping the newest head of its chain that we have verified
(8) open our part, join it, compare digests, keep the chain

A join that ended after (6) is started again at (7), where the host still shows the run with the very manifest that was
countersigned; nothing is sent then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from caltrain.attestation.evidence import Binding, EvidenceBundle
from caltrain.attestation.verify import Claims, Policy, match_plan, verify_evidence
from caltrain.boundary.sealed import PartySecret, ProvisionReceipt, seal_message, transcript_digest
from caltrain.crypto.digests import same
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import EnvironmentFault, IntegrityError, ProvisioningError
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.heads import Lookout, check_ours, shown_manifest
from caltrain.participant.identity import Identity
from caltrain.participant.journal import KeptRun, keep_run, remember_manifest, second_manifest, signed_before
from caltrain.participant.receive import receive
from caltrain.participant.seal import own_shards, shard_path
from caltrain.participant.waiting import OnStatus, OnStep, wait_through
from caltrain.plan import ManifestApproval, ManifestShard, Plan, PlanApproval, RunManifest
from caltrain.provenance.chain import empty_head

_AFTER_PROVISIONING = {
    "countersignatures",
    "shards",
    "start",
    "ingest",
    "assess",
    "train",
    "cut",
    "hunt",
    "release",
    "link",
    "linked",
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Membership:
    """An enclave that this party verified and provisioned."""

    plan: Plan
    binding: Binding
    claims: Claims
    shards: tuple[ManifestShard, ...]


def approval_of(plan: Plan, identity: Identity) -> Envelope:
    """The party's first approval. Raises AccessError when the plan does not name it with its key."""
    check_named(plan, identity)
    return identity.signer.sign("plan-approval", PlanApproval(plan=plan.digest(), party=identity.name))


def join(
    host: HostClient,
    plan: Plan,
    identity: Identity,
    policy: Policy,
    *,
    clock: Callable[[], datetime],
    seconds: float = 3600,
    allow_second_manifest: bool = False,
    on_step: OnStep = lambda _text: None,
) -> RunManifest:
    """All eight steps, or from the seventh on what an earlier join of this run left.

    Returns the manifest of the finished run; the party's folder holds model and chain.
    """
    manifest = _countersigned_already(
        host, plan, identity, seconds=seconds, allow_second=allow_second_manifest, on_step=on_step
    )
    if manifest is None:
        manifest = _enter(
            host,
            plan,
            identity,
            policy,
            clock=clock,
            seconds=seconds,
            allow_second=allow_second_manifest,
            on_step=on_step,
        )
    _see_through(host, plan, identity, manifest, deadline=time.monotonic() + seconds, on_step=on_step)
    on_step("received and joined the model, kept the head of the chain")
    return manifest


def _countersigned_already(
    host: HostClient, plan: Plan, identity: Identity, *, seconds: float, allow_second: bool, on_step: OnStep
) -> RunManifest | None:
    """The manifest of the host's run, where an earlier join countersigned it; None where this plan has none yet.

    Raises ProvisioningError `manifest.second` where the host runs the plan a second time, unless that is allowed.
    """
    before = signed_before(identity.folder, plan=plan.digest())
    if before is None:
        return None
    check_named(plan, identity)
    manifest = _shown(host, identity.name, deadline=time.monotonic() + seconds, on_step=on_step)
    if manifest is None or not same(manifest.digest(), before):
        if allow_second:
            return None
        raise second_manifest(before)
    check_ours(manifest, plan, identity)
    on_step("countersigned already: waiting for the run's end")
    return manifest


def _shown(host: HostClient, party: str, *, deadline: float, on_step: OnStep) -> RunManifest | None:
    """The manifest of the run that the host is at, None for a run that has none yet."""

    def signed(status: RunStatus) -> None:
        if status.phase == "countersignatures" and party in status.waiting_for:
            raise _too_late(f"{party}'s countersignature did not reach the host")

    def fetch() -> RunManifest:
        return shown_manifest(host, step="join")

    phases = {"resume"} | _AFTER_PROVISIONING
    try:
        return _when(host, phases, fetch, party=party, deadline=deadline, on_status=signed, on_step=on_step)
    except ProvisioningError as error:
        if error.code != "join.begun-anew":
            raise
        return None


def _enter(
    host: HostClient,
    plan: Plan,
    identity: Identity,
    policy: Policy,
    *,
    clock: Callable[[], datetime],
    seconds: float,
    allow_second: bool,
    on_step: OnStep,
) -> RunManifest:
    """Steps one to six: from the approval to the countersignature."""
    approval, shards = approval_of(plan, identity), own_shards(identity)
    theirs = host.get("/v1/plan", Plan)
    if theirs.digest() != plan.digest():
        raise ProvisioningError(
            "plan.other-at-host",
            f"the host runs {theirs.digest()}, we agreed on {plan.digest()}",
            step="compare plans",
            fix="Give the host the plan that all parties approved.",
        )
    host.post(f"/v1/parties/{identity.name}/approval", approval, dict[str, Any])
    for shard in shards:
        host.upload(f"/v1/parties/{identity.name}/shards/{shard.shard}", shard_path(identity, shard.shard))
    on_step(f"approved the plan, sent {len(shards)} sealed shards")
    if host.wait_for({"provisioning"} | _AFTER_PROVISIONING, seconds=seconds).phase != "provisioning":
        raise _too_late(f"the run has all keys already, {identity.name}'s too")
    membership = provision(host, plan, identity, policy, shards=shards, clock=clock)
    on_step(f"verified the {'simulated ' if membership.claims.simulated else ''}enclave, handed over the data key")
    host.wait_for(_AFTER_PROVISIONING, seconds=seconds)
    manifest = countersign(host, identity, membership, allow_second=allow_second)
    on_step(f"countersigned the manifest of run {manifest.run}")
    return manifest


def _see_through(
    host: HostClient, plan: Plan, identity: Identity, manifest: RunManifest, *, deadline: float, on_step: OnStep
) -> None:
    """Wait for the run's end and receive the model, as often as the host dies on the way."""

    def fetch() -> None:
        receive(host, plan, identity, manifest)

    lookout = Lookout(host, identity, manifest.run)
    _when(host, {"linked"}, fetch, party=identity.name, deadline=deadline, on_status=lookout, on_step=on_step)


def _when(
    host: HostClient,
    phases: set[str],
    fetch: Callable[[], _T],
    *,
    party: str,
    deadline: float,
    on_status: OnStatus,
    on_step: OnStep,
) -> _T:
    """What `fetch` gets once the run is in one of `phases`; tried again where the host is gone in between."""
    while True:
        wait_through(host, phases, party=party, deadline=deadline, on_status=on_status, on_step=on_step)
        try:
            return fetch()
        except EnvironmentFault as error:
            if error.code != "host.unreachable" or time.monotonic() > deadline:
                raise


def provision(
    host: HostClient,
    plan: Plan,
    identity: Identity,
    policy: Policy,
    *,
    shards: tuple[ManifestShard, ...],
    clock: Callable[[], datetime],
) -> Membership:
    """Verify the enclave, then hand over the data key. Raises AttestationError before anything secret is sealed."""
    nonce = os.urandom(32).hex()
    bundle = host.get("/v1/attestation", EvidenceBundle, params={"purpose": "training", "nonce": nonce})
    claims = verify_evidence(bundle, policy, purpose="training", plan=plan.digest(), nonce=nonce, now=clock())
    match_plan(claims.measurement, plan)
    secret = PartySecret(data_key=identity.data_key, entropy=os.urandom(32), shards=shards)
    envelope = seal_message("provision", secret, binding=bundle.binding, sender=identity.name, signer=identity.signer)
    signed = host.post(f"/v1/parties/{identity.name}/provision", envelope, Envelope)
    receipt = open_envelope(
        signed, "provision-receipt", bundle.binding.signing_key, ProvisionReceipt, step="check receipt"
    )
    if receipt.transcript != transcript_digest(bundle.binding, identity.name):
        raise ProvisioningError(
            "provision.other-receipt",
            "the enclave's receipt is for another message than ours",
            step="check receipt",
            fix="Do not countersign: the host mixes up answers. Join again, or ask the operator.",
        )
    return Membership(plan, bundle.binding, claims, shards)


def countersign(host: HostClient, identity: Identity, membership: Membership, *, allow_second: bool) -> RunManifest:
    """Check the manifest and sign it. Raises before anything is signed."""
    signed = host.get("/v1/manifest", Envelope)
    key = membership.binding.signing_key
    manifest = open_envelope(signed, "run-manifest", key, RunManifest, step="check manifest")
    check_manifest(manifest, identity.name, membership)
    plan = membership.plan.digest()
    remember_manifest(identity.folder, plan=plan, manifest=manifest.digest(), allow_second=allow_second)
    kept = KeptRun(plan=plan, manifest=manifest.digest(), signing_key=key, head=empty_head(manifest.run))
    keep_run(identity.folder, manifest.run, kept)
    approval = ManifestApproval(manifest=manifest.digest(), party=identity.name)
    envelope = identity.signer.sign("manifest-approval", approval)
    host.post(f"/v1/parties/{identity.name}/countersignature", envelope, dict[str, Any])
    return manifest


def check_manifest(manifest: RunManifest, name: str, membership: Membership) -> None:
    """Raise IntegrityError unless the manifest is of the enclave, plan, parties and shards that we know."""
    binding, plan = membership.binding, membership.plan
    if manifest.plan != plan.digest():
        raise _mismatch("it is of another plan")
    if (manifest.enclave_encryption_key, manifest.enclave_signing_key) != (binding.encryption_key, binding.signing_key):
        raise _mismatch("it names other enclave keys than the verified evidence")
    if (manifest.measurement, manifest.simulated) != (membership.claims.measurement, membership.claims.simulated):
        raise _mismatch("it describes another enclave than the verified evidence")
    if [party.name for party in manifest.parties] != [party.name for party in plan.parties]:
        raise _mismatch("it does not list exactly the parties of the plan")
    if next(party for party in manifest.parties if party.name == name).shards != membership.shards:
        raise _mismatch("it does not list exactly our shards, in our order")
    for entry, party in zip(manifest.parties, plan.parties, strict=True):
        if sum(shard.records for shard in entry.shards) < party.min_records:
            raise _mismatch(f"{party.name} contributes fewer records than the plan asks for")


def check_named(plan: Plan, identity: Identity) -> None:
    """Raise ProvisioningError `plan.other-key`, AccessError `party.unknown` unless the plan names us with our key."""
    if plan.party(identity.name).public_key != identity.signer.public:
        raise ProvisioningError(
            "plan.other-key",
            f"the plan names another key for {identity.name}",
            step="approve plan",
            fix="Have the plan corrected; it must hold the public key of your identity.json.",
        )


def _too_late(what: str) -> ProvisioningError:
    return ProvisioningError(
        "join.too-late",
        f"{what}: a join that broke off before it countersigned cannot be taken up again",
        step="join",
        fix="Have the operator start the run anew, and all parties join again.",
    )


def _mismatch(what: str) -> IntegrityError:
    return IntegrityError(
        "manifest.mismatch",
        f"the run manifest was refused: {what}",
        step="check manifest",
        fix="Do not sign. Compare with the other parties: host or enclave is not what you verified.",
    )
