"""Release and link: the model leaves, each part to whom it belongs, and gets its identity."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from caltrain.accountability.planes import stored
from caltrain.accountability.segments import Batch
from caltrain.boundary.messages import Done, Link, Release
from caltrain.boundary.sealed import ReleasedPart, seal_for
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.merkle import merkle_root
from caltrain.enclave.linkage import LinkageStore
from caltrain.enclave.opinion import outputs
from caltrain.enclave.reference import references
from caltrain.enclave.run import Run, present
from caltrain.enclave.run import State as RunState
from caltrain.enclave.segments import Place
from caltrain.enclave.zones import inner_state
from caltrain.models.weights import encode_state
from caltrain.provenance.statements import LinkedModel, ModelStatement
from caltrain.records.commitment import RecordRef

_SEGMENT = 1 << 20
Line = tuple[RecordRef, bytes]


def release(run: Run, _message: Release) -> tuple[Done, RunState]:
    """Name the whole model by its digest, seal the inner zones to each party."""
    plan, manifest, course = present(run.plan), present(run.manifest), present(run.course)
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
    run.record_once(
        "release",
        {"model": run.model_digest, "audit_rate": run.audit_rate, "seed_revealed": plan.release.reveal_seed},
    )
    return Done(sealed=sealed, signed=run.vault.signing.sign("model", statement)), RunState.RELEASED


def link(run: Run, _message: Link) -> tuple[Done, RunState]:
    """Of every record fingerprint, label, source and commitment, as the hunt's pass found them, into the store."""
    passed = present(run.passed)
    lines = passed.lines
    run.linkage = _store(run, passed.fingerprints, passed.labels, lines)
    run.references = references(run, passed.fingerprints, passed.labels)
    run.outputs = outputs(run, passed)
    run.passed = None
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
    body: dict[str, object] = {
        "model": run.model_digest,
        "records": statement.records,
        "statement": digest("linked-model/v1", canonical_json(statement)),
    }
    run.record_once("link", body)
    return Done(signed=run.vault.signing.sign("linked-model", statement)), RunState.LINKED


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
