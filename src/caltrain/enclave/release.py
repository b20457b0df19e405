"""Release and link: the model leaves, each part to whom it belongs, and gets its identity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from caltrain.accountability.neighbours import label_disagreement
from caltrain.accountability.planes import stored
from caltrain.accountability.segments import Batch
from caltrain.boundary.messages import Done, Link, Release
from caltrain.boundary.sealed import LEFT_OUT, ReleasedPart, SuspicionReport, seal_for
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.merkle import merkle_root
from caltrain.enclave.ingest import lineage, unpack
from caltrain.enclave.linkage import LinkageStore
from caltrain.enclave.reference import references
from caltrain.enclave.run import Run, present
from caltrain.enclave.run import State as RunState
from caltrain.enclave.segments import Place
from caltrain.enclave.zones import inner_state, joined, same_center, shown_center
from caltrain.errors import IntegrityError
from caltrain.models.network import features_and_logits
from caltrain.models.weights import encode_state, model_digest, state_of
from caltrain.provenance.chain import EventKind
from caltrain.provenance.statements import LinkedModel, ModelStatement
from caltrain.records.commitment import RecordRef
from caltrain.training.batches import center_crop, normalise

_LINK_BATCH = 256
_SEGMENT = 1 << 20
Line = tuple[RecordRef, bytes]


def release(run: Run, _message: Release) -> tuple[Done, RunState]:
    """Join the zones, name the whole by its digest, seal the inner zones to each party."""
    plan, manifest = present(run.plan), present(run.manifest)
    course = present(run.course)
    same_center(run)
    center = shown_center(run, (course.epoch, course.step), course.center)
    run.model = joined(run, center)
    run.model_digest = model_digest(plan.model, state_of(run.model))
    part = ReleasedPart(
        model=run.model_digest,
        weights=encode_state(inner_state(run)),
        run_seed=run.seed if plan.release.reveal_seed else b"",
    )
    sealed = {
        name: seal_for(secret.data_key, "release/v1", part, context=run.vault.run)
        for name, secret in run.vault.parties.items()
    }
    statement = ModelStatement(
        run=run.vault.run,
        plan=plan.digest(),
        manifest=manifest.digest(),
        model=run.model_digest,
        epochs=course.epoch,
        front_public=plan.training.initial is not None,
        audit_rate=run.audit_rate,
        resumes=run.resumes,
        simulated=run.vault.attester.simulated,
        repair=plan.repair or None,
    )
    _record_once(
        run,
        "release",
        {"model": run.model_digest, "audit_rate": run.audit_rate, "seed_revealed": plan.release.reveal_seed},
    )
    return Done(sealed=sealed, signed=run.vault.signing.sign("model", statement)), RunState.RELEASED


def _record_once(run: Run, kind: EventKind, body: dict[str, object]) -> None:
    """A run that was taken up again after its release does not release another time."""
    if not run.chain.holds(kind, body):
        run.record(kind, body)


def link(run: Run, _message: Link) -> tuple[Done, RunState]:
    """One forward pass of all records, without augmentation: fingerprint, label, source, commitment of each."""
    fingerprints, labels, lines = _passed(run)
    if not bool(fingerprints.isfinite().all()):
        raise IntegrityError(
            "link.not-finite",
            "the model's features of a record are not finite numbers",
            step="link",
            fix="Train again: the CenterNet, finite itself, overflows. The host may have made it so.",
        )
    run.linkage = _store(run, fingerprints, labels, lines)
    run.references = references(run, fingerprints, labels)
    root = merkle_root(sorted(commitment for _, commitment in lines))
    statement = LinkedModel(
        run=run.vault.run,
        model=run.model_digest,
        records=len(lines),
        commitments="sha256:" + root.hex(),
        audit_rate=run.audit_rate,
        resumes=run.resumes,
        simulated=run.vault.attester.simulated,
        repair=present(run.plan).repair or None,
    )
    _record_once(
        run, "link", {"model": run.model_digest, "records": statement.records, "statement": _digest(statement)}
    )
    sealed = _suspicion(run, fingerprints, labels, [reference for reference, _ in lines])
    return Done(signed=run.vault.signing.sign("linked-model", statement), sealed=sealed), RunState.LINKED


def _passed(run: Run) -> tuple[Tensor, Tensor, list[Line]]:
    """Of every record its fingerprint (N, D) and label (N,), where it is, and its commitment."""
    plan, pool, model = present(run.plan), present(run.pool), present(run.model)
    features, labels = [], []
    lines: list[Line] = []
    # Batches follow the last permutation, so the order of access tells nothing of whose record is where.
    for start in range(0, pool.shape.records, pool.shape.block):
        rows = pool.rows(start, min(start + pool.shape.block, pool.shape.records))
        elements, own_labels = unpack(rows, plan.data)
        with torch.inference_mode():
            for part in torch.split(elements, _LINK_BATCH):
                x = center_crop(part, plan.model.size)
                x = normalise(x, plan.data, channels_last=plan.training.channels_last)
                features.append(features_and_logits(model, plan.model, x)[0])
        labels.append(own_labels)
        lines += lineage(rows, present(run.manifest))
        run.door.progress("link", start + len(rows), pool.shape.records)
    return torch.cat(features), torch.cat(labels), lines


def _store(run: Run, fingerprints: Tensor, labels: Tensor, lines: Sequence[Line]) -> LinkageStore:
    """Sealed with the host, and read back whole: what it lost shows now, and no question tells by reads what it is."""
    store = LinkageStore.create(run.door, Place.fresh(run.vault.run))
    for start in range(0, len(lines), _SEGMENT):
        here = slice(start, start + _SEGMENT)
        references, commitments = zip(*lines[here], strict=True)
        batch = Batch.of(stored(fingerprints[here]), labels[here].tolist(), references, commitments)
        store.append(batch, model=run.model_digest, time=len(run.chain))
    store.load(run.model_digest)
    return store


def _digest(statement: LinkedModel) -> str:
    return digest("linked-model/v1", canonical_json(statement))


def _suspicion(run: Run, fingerprints: Tensor, labels: Tensor, records: Sequence[RecordRef]) -> dict[str, bytes]:
    """Each party's own records, by how much their neighbours' labels disagree with theirs: sealed to that party."""
    plan, manifest = present(run.plan), present(run.manifest)
    scores = label_disagreement(fingerprints, labels, k=plan.trace.suspicion_neighbours)
    table = {(r.party, r.shard, r.leaf): round(float(s) * 1000) for r, s in zip(records, scores, strict=True)}
    sealed: dict[str, bytes] = {}
    for party in manifest.parties:
        own = {
            s.shard: b"".join(
                table.get((party.name, s.shard, leaf), LEFT_OUT).to_bytes(2, "little") for leaf in range(s.records)
            )
            for s in party.shards
            if not s.held_out
        }
        report = SuspicionReport(model=run.model_digest, scores=own)
        key = run.vault.parties[party.name].data_key
        sealed[party.name] = seal_for(key, "suspicion/v1", report, context=run.vault.run)
    return sealed
