"""After the run: open our part of the model, join it with the CenterNet, verify, keep the chain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import msgspec

from caltrain.boundary.sealed import ReleasedPart, SuspicionReport, open_for
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.digests import Digest
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, open_envelope
from caltrain.errors import UNDECODABLE, EnvironmentFault, IntegrityError
from caltrain.host_client import HostClient
from caltrain.participant.files import write_whole
from caltrain.participant.identity import Identity
from caltrain.participant.journal import kept_run
from caltrain.plan import Plan, RunManifest
from caltrain.provenance.chain import MAX_EVENTS, verify_chain
from caltrain.provenance.statements import LinkedModel, ModelStatement

MAX_CHAIN_BYTES = 1 << 30
SUSPICION = "suspicion.sealed"
"""The file of a run's folder that holds the hunt's report."""
_STEP = "receive model"


class RunRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a party keeps of a finished run beside the model (`run.json`)."""

    manifest: RunManifest
    model: Digest
    linked: Envelope
    head: Digest
    run_seed: Annotated[str, msgspec.Meta(max_length=64)] = ""


def run_folder(identity: Identity, run: str) -> Path:
    """Where a party keeps a run."""
    return identity.folder / "runs" / run


def receive(host: HostClient, plan: Plan, identity: Identity, manifest: RunManifest) -> RunRecord:
    """Fetch, verify and keep model, suspicion report and chain. Nothing is kept unless all of it verifies."""
    key = manifest.enclave_signing_key
    part = open_for(
        identity.data_key,
        "release/v1",
        host.artifact(f"release/{identity.name}"),
        ReleasedPart,
        context=manifest.run,
        step=_STEP,
    )
    statement = open_envelope(_envelope(host, "release.json"), "model", key, ModelStatement, step=_STEP)
    linked_envelope = _envelope(host, "suspicion.json")
    linked = open_envelope(linked_envelope, "linked-model", key, LinkedModel, step=_STEP)
    same_model = part.model == statement.model == linked.model
    run = (statement.manifest, statement.run, linked.run)
    if not same_model or run != (manifest.digest(), manifest.run, manifest.run):
        raise _mismatch("release, statement and link do not speak of one model of this run")
    if not statement.repair == linked.repair == (plan.repair or None):
        raise _mismatch("release and link do not say of the repair what the plan says")
    weights = join_weights(plan, part.weights, host.artifact("center"), digest=part.model)
    sealed = host.artifact(f"suspicion/{identity.name}")
    suspicion = open_for(identity.data_key, "suspicion/v1", sealed, SuspicionReport, context=manifest.run, step=_STEP)
    if suspicion.model != part.model:
        raise _mismatch("the suspicion report is of another model")
    chain = read_chain(host.artifact("chain.jsonl", limit=MAX_CHAIN_BYTES))
    kept = kept_run(identity.folder, manifest.run)
    events = verify_chain(chain, run=manifest.run, signing_key=key, head=kept.head if kept else None)
    if not any(event.kind == "link" and event.body.get("model") == part.model for event in events):
        raise _mismatch("the chain does not reach the link of this model")
    record = RunRecord(
        manifest=manifest,
        model=part.model,
        linked=linked_envelope,
        head=events[-1].digest(),
        run_seed=part.run_seed.hex(),
    )
    _keep(run_folder(identity, manifest.run), plan, weights, record, sealed, chain)
    return record


def join_weights(plan: Plan, inner: bytes, center: bytes, *, digest: str) -> bytes:
    """The whole model as safetensors. Raises IntegrityError unless it is the one that the enclave named."""
    # Imported here: a party that only seals and approves needs no torch.
    from caltrain.models.weights import decode_state, encode_state, model_digest  # noqa: PLC0415

    state = decode_state(inner, step=_STEP) | decode_state(center, step=_STEP)
    if model_digest(plan.model, state) != digest:
        raise _mismatch("the joined model is not the one that the enclave signed")
    return encode_state(state)


def read_chain(raw: bytes) -> list[Envelope]:
    """Envelopes of a chain log, one JSON line each."""
    lines = raw.splitlines()
    if len(lines) > MAX_EVENTS:
        raise _mismatch(f"a chain of {len(lines)} events")
    try:
        return [json_decoder(Envelope).decode(line) for line in lines]
    except UNDECODABLE as error:
        raise _mismatch(f"the chain is not readable: {error}") from None


def _envelope(host: HostClient, name: str) -> Envelope:
    try:
        return json_decoder(Envelope).decode(host.artifact(name, limit=MAX_ENVELOPE_BYTES))
    except UNDECODABLE as error:
        raise _mismatch(f"{name} is not an envelope: {error}") from None


def _keep(folder: Path, plan: Plan, weights: bytes, record: RunRecord, suspicion: bytes, chain: list[Envelope]) -> None:
    again = (folder / "run.json").exists()
    try:
        write_whole(folder / "model.safetensors", weights)
        write_whole(folder / "plan.json", msgspec.json.encode(plan))
        write_whole(folder / SUSPICION, suspicion)  # as it was sealed: a change of it is found out later, too
        write_whole(folder / "chain.jsonl", b"".join(msgspec.json.encode(e) + b"\n" for e in chain))
        # Last, so that a folder with run.json is whole.
        write_whole(folder / "run.json", msgspec.json.encode(record))
    except EnvironmentFault:
        if not again:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _mismatch(what: str) -> IntegrityError:
    return IntegrityError(
        "release.mismatch",
        f"the released model was refused: {what}",
        step=_STEP,
        fix="Do not use it. Ask the host again, and compare digests with the other parties.",
    )
