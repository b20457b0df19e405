"""At the link pass: how far clean queries are from the records of their class.

Clean queries are held-out records, by the class that the model predicts for them, as a user's inputs are. Where there
are too few of them, records of the class themselves, each without itself; those the model was trained on, so they lie
closer together than what it has not seen. Neither is known to be clean: a contributor may have poisoned some of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from caltrain.accountability.reference import Reference
from caltrain.enclave.ingest import unpack
from caltrain.enclave.linkage import Hit
from caltrain.enclave.run import Run, present
from caltrain.models.network import features_and_logits
from caltrain.records.commitment import RecordRef
from caltrain.training.batches import center_crop, normalise

SAMPLE = 1000
"""Clean queries of a class, at most: the share that follows from them is right to 0.03 or so."""
ENOUGH = 20
_BATCH = 256


def references(run: Run, fingerprints: Tensor, labels: Tensor, records: Sequence[RecordRef]) -> dict[int, Reference]:
    """A reference for each class that can have one.

    All records' fingerprints (N, D) and labels (N,) come in the order of the pool, which is drawn: the first of a class
    are a sample of it.
    """
    store, model, spec = present(run.linkage), run.model_digest, present(run.plan).trace
    held_out = _held_out(run)
    found: dict[int, Reference] = {}
    for label in store.labels(model):
        there, queries = store.count(model, label), held_out.get(label, fingerprints[:0])
        if len(queries) >= ENOUGH:
            hits = store.nearest(queries, model=model, labels=[label], k=min(spec.neighbours, there))
            distances = [[hit.distance for hit in near] for near in hits]
            found[label] = Reference.of("held-out", distances, step=spec.distance_step)
        elif there > 1:
            own = (labels == label).nonzero()[:SAMPLE, 0].tolist()
            hits = store.nearest(fingerprints[own], model=model, labels=[label], k=min(spec.neighbours + 1, there))
            distances = [_others(near, records[i]) for i, near in zip(own, hits, strict=True)]
            found[label] = Reference.of("leave-one-out", distances, step=spec.distance_step)
    return found


def _others(hits: Sequence[Hit], own: RecordRef) -> list[float]:
    """Distances to other records; where copies stand before it, the record itself is not even among the nearest."""
    return [hit.distance for hit in hits if hit.record != own][: len(hits) - 1]


def _held_out(run: Run) -> dict[int, Tensor]:
    """Fingerprints of held-out records by predicted class, as far as they could be asked about. Reads all, in order."""
    plan, model = present(run.plan), present(run.model)
    found: dict[int, list[Tensor]] = defaultdict(list)
    for rows in run.held_out.batches(_BATCH, whole=False) if run.held_out else ():
        elements, _ = unpack(rows, plan.data)
        with torch.inference_mode():
            x = normalise(center_crop(elements, plan.model.size), plan.data, channels_last=plan.training.channels_last)
            features, logits = features_and_logits(model, plan.model, x)
        sound = features.isfinite().all(dim=1) & features.any(dim=1) & logits.isfinite().all(dim=1)
        for row, label in zip(features[sound], logits[sound].argmax(dim=1).tolist(), strict=True):
            if len(found[label]) < SAMPLE:
                found[label].append(row)
    return {label: torch.stack(rows) for label, rows in found.items()}
