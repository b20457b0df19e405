"""At the link pass: how far clean queries are from the records of their class.

Clean queries are held-out records, by the class that the model predicts for them, as a user's inputs are. Where there
are too few of them, records of the class themselves, each without itself; those the model was trained on, so they lie
closer together than what it has not seen. Neither is known to be clean: a contributor may have poisoned some of them.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from caltrain.accountability.neighbours import squared_distances
from caltrain.accountability.planes import stored
from caltrain.accountability.reference import Reference
from caltrain.enclave.ingest import unpack
from caltrain.enclave.run import Run, present
from caltrain.models.network import features_and_logits
from caltrain.training.batches import center_crop, normalise

SAMPLE = 1000
"""Clean queries of a class, at most: the share that follows from them is right to 0.03 or so."""
ENOUGH = 20
_BATCH = 256
_AT_ONCE = 64
_PRODUCTS = 1 << 24


def references(run: Run, fingerprints: Tensor, labels: Tensor) -> dict[int, Reference]:
    """A reference for each class that can have one.

    All records' fingerprints (N, D) and labels (N,) come in the order of the pool, which is drawn: the first of a class
    are a sample of it.
    """
    spec, held_out = present(run.plan).trace, _held_out(run)
    found: dict[int, Reference] = {}
    for label in sorted(set(labels.tolist())):
        rows = stored(fingerprints[labels == label]).float()
        queries = held_out.get(label, rows[:0])
        if len(queries) >= ENOUGH:
            distances = _distances(queries, rows, k=spec.neighbours)
            found[label] = Reference.of("held-out", distances, step=spec.distance_step)
        elif len(rows) > 1:
            distances = [each[1:] for each in _distances(rows[:SAMPLE], rows, k=spec.neighbours + 1)]
            found[label] = Reference.of("leave-one-out", distances, step=spec.distance_step)
    return found


def _distances(queries: Tensor, rows: Tensor, *, k: int) -> list[list[float]]:
    """From each query (Q, D) to the `k` nearest rows (N, D), or to all where there are fewer, nearest first."""
    found: list[list[float]] = []
    for some in torch.split(queries, max(1, min(_AT_ONCE, _PRODUCTS // len(rows)))):
        # Twice as many by inner products, which lose digits where it is near; of these the distances by differences.
        near = squared_distances(some, rows).topk(min(2 * k, len(rows)), largest=False).indices
        exact = (rows[near] - some[:, None]).norm(dim=2).sort(dim=1).values
        found += exact[:, :k].tolist()
    return found


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
