"""From the plan to the countersigned manifest: who takes part, with which keys and shards."""

from __future__ import annotations

from caltrain.boundary.messages import Attest, Configure, Countersign, Done, MakeManifest, Provision
from caltrain.boundary.sealed import PartySecret, ProvisionReceipt, SealedMessage, open_message
from caltrain.crypto.dsse import open_envelope
from caltrain.enclave.checkpoint import take_custody, write_checkpoint
from caltrain.enclave.run import Run, State, present
from caltrain.errors import AttestationError, ProvisioningError
from caltrain.models.wheel import load_wheel
from caltrain.plan import (
    ManifestParty,
    Party,
    Plan,
    RunManifest,
    check_approval,
    check_countersignature,
    plan_from_json,
)
from caltrain.records.shard import key_id
from caltrain.training.seeds import run_seed


def configure(run: Run, message: Configure) -> tuple[Done, State]:
    """Take the plan that every party has approved, if it names this program."""
    plan = plan_from_json(message.plan)
    check_program(run, plan)
    for party in plan.parties:
        envelope = message.approvals.get(party.name)
        if envelope is None:
            raise _not_in("provision.not-approved", party.name, "has not approved the plan", "configure")
        check_approval(plan, party.name, envelope)
    take_wheel(run, plan)
    run.plan = plan
    run.record("plan", {"plan": plan.digest(), "form": plan.partition.form, "simulated": run.vault.attester.simulated})
    for party in plan.parties:
        run.record("approval", {"party": party.name})
    return Done(), State.ENROLLING


def check_program(run: Run, plan: Plan) -> None:
    """Raise AttestationError unless the plan names this program."""
    own = run.vault.attester.measurement
    if plan.enclave.measurement != own:
        raise AttestationError(
            "plan.other-measurement",
            f"the plan trusts {plan.enclave.measurement}, this enclave is {own}",
            step="configure",
            fix="Run the program that the plan names, or have a new plan approved.",
        )


def take_wheel(run: Run, plan: Plan) -> None:
    """Load the wheel that was measured with this program, which must be the one that the plan names."""
    if (plan.model.wheel is None) != (not run.wheel):
        raise AttestationError(
            "plan.other-wheel",
            "the plan names a wheel and the enclave was started without, or the reverse",
            step="configure",
            fix="Start the enclave with the wheel that the plan names.",
        )
    if plan.model.wheel is not None:
        run.factory = load_wheel(run.wheel, plan.model.wheel)


_ATTESTS = {State.ENROLLING: "training", State.RESUMING: "resume", State.LINKED: "query"}


def attest(run: Run, message: Attest) -> tuple[Done, State]:
    """Evidence for a party (training, resume) or, once the model is linked, for a model user (query)."""
    if message.purpose != _ATTESTS.get(run.state):
        raise AttestationError(
            "attest.purpose",
            f"a run that is {run.state} gives no evidence for {message.purpose}",
            step="attest",
            fix="Parties attest before the manifest or to resume a run, model users once the model is linked.",
        )
    return Done(
        bundle=run.vault.attest(message.purpose, plan=present(run.plan).digest(), nonce=message.nonce)
    ), run.state


def provision(run: Run, message: Provision) -> tuple[Done, State]:
    """Take a party's data key, entropy and shard list."""
    party = present(run.plan).party(message.party)
    sealed = open_envelope(message.envelope, "provision", party.public_key, SealedMessage, step="provision")
    if sealed.sender != party.name:
        raise _not_in("provision.other-sender", party.name, "sent a message in another name", "provision")
    binding = run.vault.redeem(sealed, "training")
    secret = open_message(sealed, PartySecret, binding=binding, key=run.vault.encryption, step="provision")
    _check_shards(run, party, secret)
    run.vault.parties[party.name] = secret
    run.record("provision", {"party": party.name, "key_id": key_id(secret.data_key), "shards": len(secret.shards)})
    receipt = run.vault.signing.sign("provision-receipt", ProvisionReceipt(transcript=sealed.transcript))
    return Done(signed=receipt), State.ENROLLING


def _check_shards(run: Run, party: Party, secret: PartySecret) -> None:
    ids = [shard.shard for shard in secret.shards]
    if len(set(ids)) != len(ids) or len({shard.root for shard in secret.shards}) != len(ids):
        raise _not_in("provision.duplicate-shard", party.name, "lists one shard twice", "provision")
    records = sum(shard.records for shard in secret.shards)
    if records < party.min_records:
        raise _not_in(
            "provision.too-few-records",
            party.name,
            f"brings {records} records, the plan asks for {party.min_records}",
            "provision",
        )
    others = (s.data_key for name, s in run.vault.parties.items() if name != party.name)
    if secret.data_key in others:
        raise _not_in("provision.shared-key", party.name, "uses another party's data key", "provision")


def make_manifest(run: Run, _message: MakeManifest) -> tuple[Done, State]:
    """Sign what will be trained on, by whom, under which keys."""
    plan, vault = present(run.plan), run.vault
    missing = [party.name for party in plan.parties if party.name not in vault.parties]
    if missing:
        raise _not_in("provision.missing", missing[0], "has not handed over its key", "make manifest")
    entries = tuple(
        ManifestParty(name=p.name, key_id=key_id(vault.parties[p.name].data_key), shards=vault.parties[p.name].shards)
        for p in plan.parties
    )
    manifest = RunManifest(
        run=vault.run,
        plan=plan.digest(),
        evidence_kind=vault.attester.kind,
        simulated=vault.attester.simulated,
        measurement=vault.attester.measurement,
        enclave_encryption_key=vault.encryption.public,
        enclave_signing_key=vault.signing.public,
        parties=entries,
    )
    if plan.training.patience and not manifest.records(held_out=True):
        raise ProvisioningError(
            "manifest.nothing-held-out",
            "the plan ends the run by a loss on held-out records, but nobody held any out",
            step="make manifest",
            fix="Have a party seal a shard of held-out records, or agree on patience = 0.",
        )
    if manifest.trained(plan) < plan.training.batch:
        raise ProvisioningError(
            "manifest.too-few-records",
            f"{manifest.trained(plan)} records do not fill one batch of {plan.training.batch}",
            step="make manifest",
            fix="Contribute more records, or agree on a smaller batch.",
        )
    run.manifest = manifest
    run.seed = run_seed(vault.randomness, [vault.parties[party.name].entropy for party in plan.parties])
    take_custody(run)
    run.record("manifest", {"manifest": manifest.digest(), "records": manifest.records()})
    return Done(signed=vault.signing.sign("run-manifest", manifest)), State.AGREEING


def countersign(run: Run, message: Countersign) -> tuple[Done, State]:
    """Take a party's second approval; with the last one, the run may begin."""
    plan, manifest = present(run.plan), present(run.manifest)
    check_countersignature(plan, manifest, message.party, message.envelope)
    signed = run.countersigned | {message.party}
    state = State.AGREED if len(signed) == len(plan.parties) else State.AGREEING
    if message.party not in run.countersigned:
        run.record("countersignature", {"party": message.party})
    if state is State.AGREED:
        write_checkpoint(run, state)
    run.countersigned = signed  # last: a host that does not store the checkpoint leaves everything as it was
    return Done(), state


def _not_in(code: str, party: str, what: str, step: str) -> ProvisioningError:
    return ProvisioningError(code, f"{party} {what}", step=step, fix=f"Have {party} join with the plan as it stands.")
