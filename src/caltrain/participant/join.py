"""Take part in a run: approve, upload, verify the enclave, provision, countersign, receive the model.

(1) no manifest of this plan was signed before, or a second one is allowed; the host's plan is the one we hold
(2) send approval and sealed shards
(3) fresh nonce -> evidence -> our policy
(4) only then: data key and entropy, sealed
(5) the manifest has our shards, every party, the attested keys
(6) no other manifest of this plan was signed: countersign
(7) wait for the run, through deaths of host and enclave, keeping the newest head of its chain that we have verified
(8) open our part, join it, compare digests, keep the chain
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from caltrain.attestation.evidence import Binding, EvidenceBundle
from caltrain.attestation.verify import Claims, Policy, match_plan, verify_evidence
from caltrain.boundary.sealed import PartySecret, ProvisionReceipt, seal_message, transcript_digest
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import EnvironmentFault, IntegrityError, ProvisioningError
from caltrain.host_client import HostClient
from caltrain.participant.heads import Lookout
from caltrain.participant.identity import Identity
from caltrain.participant.journal import KeptRun, keep_run, refuse_second, remember_manifest
from caltrain.participant.receive import receive
from caltrain.participant.seal import own_shards, shard_path
from caltrain.participant.waiting import OnStep, wait_through
from caltrain.plan import ManifestApproval, ManifestShard, Plan, PlanApproval, RunManifest
from caltrain.provenance.chain import empty_head

_AFTER_PROVISIONING = {"countersignatures", "shards", "start", "ingest", "train", "cut", "release", "link", "linked"}


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
    """All eight steps. Returns the manifest of the finished run; the party's folder holds model and chain."""
    if not allow_second_manifest:
        refuse_second(identity.folder, plan=plan.digest())
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
        raise ProvisioningError(
            "join.too-late",
            f"the run has all keys already, {identity.name}'s too: a join that broke off cannot be taken up again",
            step="wait for provisioning",
            fix="Have the operator start the run anew, and all parties join again.",
        )
    membership = provision(host, plan, identity, policy, shards=shards, clock=clock)
    on_step(f"verified the {'simulated ' if membership.claims.simulated else ''}enclave, handed over the data key")
    host.wait_for(_AFTER_PROVISIONING, seconds=seconds)
    manifest = countersign(host, identity, membership, allow_second=allow_second_manifest)
    on_step(f"countersigned the manifest of run {manifest.run}")
    _see_through(host, plan, identity, manifest, deadline=time.monotonic() + seconds, on_step=on_step)
    on_step("received and joined the model, kept the head of the chain")
    return manifest


def _see_through(
    host: HostClient, plan: Plan, identity: Identity, manifest: RunManifest, *, deadline: float, on_step: OnStep
) -> None:
    """Wait for the run's end and receive the model, as often as the host dies on the way."""
    lookout = Lookout(host, identity, manifest.run)
    while True:
        wait_through(host, {"linked"}, party=identity.name, deadline=deadline, on_status=lookout, on_step=on_step)
        try:
            receive(host, plan, identity, manifest)
        except EnvironmentFault as error:
            if error.code != "host.unreachable" or time.monotonic() > deadline:
                raise
        else:
            return


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


def _mismatch(what: str) -> IntegrityError:
    return IntegrityError(
        "manifest.mismatch",
        f"the run manifest was refused: {what}",
        step="check manifest",
        fix="Do not sign. Compare with the other parties: host or enclave is not what you verified.",
    )
