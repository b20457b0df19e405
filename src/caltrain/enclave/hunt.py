"""The hunt: before the model leaves, every record passes it once, and each party learns what is suspicious of its own.

What the pass finds waits for the link, so no record is read for it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from caltrain.accountability.cases import Dossier, Links
from caltrain.accountability.labels import LabelFindings, examine
from caltrain.accountability.neighbours import label_disagreement
from caltrain.accountability.scans import activation_clusters, spectral
from caltrain.boundary.messages import Done, Hunt
from caltrain.boundary.sealed import LEFT_OUT, Scan, SuspicionReport, seal_for
from caltrain.enclave.contents import Contents, Learning, Passed, not_finite
from caltrain.enclave.ingest import contributors_of, lineage, unpack
from caltrain.enclave.run import Run, State, present
from caltrain.enclave.zones import joined, same_center, shown_center
from caltrain.errors import UNCOMPUTABLE
from caltrain.exposure.figures import Estimate
from caltrain.models.network import last_features
from caltrain.models.weights import model_digest, state_of
from caltrain.records.commitment import RecordRef
from caltrain.training.batches import center_crop, normalise

_BATCH = 256
_ROOM = 48 << 20
"""What the reports of a run may take with predictions: they leave in one frame (`frames.MAX_FRAME`)."""
Scores = Mapping[Scan, Tensor | None]
Steps = NDArray[np.uint16]
T = TypeVar("T")


class _Found(NamedTuple):
    """By scan the suspicion (N,) of every record; by party its share of wrong labels; the out-of-fold view (N, C)."""

    scores: Scores
    shares: Mapping[str, Estimate]
    view: Tensor | None


def hunt(run: Run, _message: Hunt) -> tuple[Done, State]:
    """Join the zones, pass all records, scan them; seal to each party what was found of its own."""
    plan, course = present(run.plan), present(run.course)
    same_center(run)
    model = joined(run, shown_center(run, (course.epoch, course.step), course.center))
    run.model, run.model_digest = model, model_digest(plan.model, state_of(model))
    run.passed, run.contents = _pass(run)
    found = _scan(run, run.passed, run.contents)
    sealed = _reports(run, found)
    body: dict[str, object] = {
        "model": run.model_digest,
        "records": len(run.passed.labels),
        "scans": sorted(found.scores),
    }
    run.record_once("hunt", body)
    return Done(sealed=sealed), State.HUNTED


def _pass(run: Run) -> tuple[Passed, Contents]:
    """Every record through the model and past the witnesses, without augmentation."""
    plan, manifest, pool, model = present(run.plan), present(run.manifest), present(run.pool), present(run.model)
    learning = Learning(pool, plan.data, contributors=len(manifest.parties), seed=run.seed)
    features, lengths, odds, labels, sources = [], [], [], [], []
    lines: list[tuple[RecordRef, bytes]] = []
    # Blocks follow the last permutation, so the order of access tells nothing of whose record is where.
    for start in range(0, pool.shape.records, pool.shape.block):
        rows = pool.rows(start, min(start + pool.shape.block, pool.shape.records))
        elements, own_labels = unpack(rows, plan.data)
        with torch.inference_mode():
            for part in torch.split(elements, _BATCH):
                x = center_crop(part, plan.model.size)
                x = normalise(x, plan.data, channels_last=plan.training.channels_last)
                embedding, logits = last_features(model, plan.model, x)
                features.append(F.normalize(embedding, dim=1))
                lengths.append(embedding.norm(dim=1))
                odds.append(logits.softmax(1))
        learning.add(rows, elements, own_labels)
        labels.append(own_labels)
        sources.append(contributors_of(rows))
        lines += lineage(rows, manifest)
        run.door.progress("hunt", start + len(rows), pool.shape.records)
    fingerprints = torch.cat(features)
    if not bool(fingerprints.isfinite().all()):
        raise not_finite("features")
    figures = (torch.cat(part) for part in (lengths, odds, labels, sources))
    return Passed(lines, fingerprints, *figures), learning.done()


def _scan(run: Run, passed: Passed, contents: Contents) -> _Found:
    parties = present(run.manifest).parties
    links = Links(passed.fingerprints, passed.labels, passed.sources, tuple(party.name for party in parties))
    k = present(run.plan).trace.suspicion_neighbours
    witnesses = contents.in_order(torch.arange(len(passed.labels)))
    findings = _tried(lambda: examine(Dossier(links, witnesses), passed.probabilities))
    outlying = _tried(lambda: spectral(links))
    scores: Scores = {
        "disagreement": label_disagreement(links.fingerprints, links.labels, k=k),
        "labels": None if findings is None else findings.suspicion,
        "spectral": None if outlying is None else outlying / (1 + outlying),
        "clusters": _tried(lambda: activation_clusters(links)),
    }
    records = passed.sources.bincount(minlength=len(parties)).tolist()
    shares = {party.name: _share(i, records[i], findings) for i, party in enumerate(parties)}
    return _Found(scores, shares, None if findings is None else findings.view)


def _tried(scan: Callable[[], T]) -> T | None:
    """What a scan finds. One whose figures fail on these records costs nobody the model."""
    try:
        return scan()
    except UNCOMPUTABLE:
        return None


def _share(index: int, records: int, findings: LabelFindings | None) -> Estimate:
    """A party's share of wrong labels; anything from 0 to 1 where that could not be worked out."""
    figures = (findings.shares.estimate, findings.shares.low, findings.shares.high) if findings else ()
    own = [round(float(figure[index]), 3) for figure in figures]
    share, low, high = own if own and all(map(math.isfinite, own)) else (0.0, 0.0, 1.0)
    return Estimate(share, low, high, records)


def _reports(run: Run, found: _Found) -> dict[str, bytes]:
    """Sealed to each party, of its own records: what was found of them; the shares that the plan lets it see."""
    plan, lines, parties = present(run.plan), present(run.passed).lines, present(run.manifest).parties
    place = {(record.party, record.shard, record.leaf): row for row, (record, _) in enumerate(lines)}
    trained = {p.name: [shard for shard in p.shards if not shard.held_out] for p in parties}
    steps = {scan: _in_steps(own, len(lines)) for scan, own in found.scores.items()}
    # Whether there is room depends on what the manifest says: its shards' records, left out or not.
    taken = 2 * (len(steps) + len(plan.data.classes)) * sum(shard.records for own in trained.values() for shard in own)
    view = _in_halves(found.view, len(lines), len(plan.data.classes)) if taken <= _ROOM else None
    sealed: dict[str, bytes] = {}
    for party, shards in trained.items():
        rows = {s.shard: [place.get((party, s.shard, leaf), -1) for leaf in range(s.records)] for s in shards}
        report = SuspicionReport(
            model=run.model_digest,
            scores={scan: {shard: own[at].tobytes() for shard, at in rows.items()} for scan, own in steps.items()},
            out_of_fold={} if view is None else {shard: view[at].tobytes() for shard, at in rows.items()},
            wrong_labels={n: share for n, share in found.shares.items() if plan.trace.share_quality or n == party},
        )
        sealed[party] = seal_for(run.vault.parties[party].data_key, "suspicion/v1", report, context=run.vault.run)
    return sealed


def _in_steps(scores: Tensor | None, records: int) -> Steps:
    """Scores in steps of 1/1000 (N + 1,): `LEFT_OUT` is the last, of records not passed, and all that is unknown."""
    found = np.full(records + 1, LEFT_OUT, "<u2")
    if scores is not None and bool(scores.isfinite().all()):
        found[:-1] = (scores.double().clamp(0, 1) * 1000).round().numpy()
    return found


def _in_halves(view: Tensor | None, records: int, classes: int) -> Steps:
    """Class probabilities as the bits of float16 (N + 1, C): `LEFT_OUT` is the last row, and all that is unknown."""
    found = np.full((records + 1, classes), LEFT_OUT, "<u2")
    if view is not None and bool(view.isfinite().all()):
        found[:-1] = view.half().view(torch.uint16).numpy()
    return found
