"""The fingerprints around the traced inputs, flattened to a plane.

The enclave lets no fingerprint out in clear. The demo holds all records and the run's seed, so it trains the same
model plainly, to the same bits, and computes them itself.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from caltrain.demo.compare import Finished
from caltrain.demo.result import Point, Space
from caltrain.models.network import Network
from caltrain.participant.model import embed
from caltrain.records.commitment import RecordRef

MAX_RECORDS, MAX_INPUTS = 1600, 400
Plane = tuple[NDArray[np.float64], NDArray[np.float64]]


def flatten(finished: Finished, plain: Network) -> Space:
    """The class that most traced inputs are taken for: its records and these inputs, in one plane."""
    plan, rows = finished.project.plan, finished.lineage.rows
    label, _ = Counter(finished.verdict.predicted).most_common(1)[0]
    own = [r for r in sorted(finished.manifest.references()) if rows[r][0].labels[rows[r][1]] == label]
    named, suspicion = finished.verdict.records(), finished.suspicion_of("labels", "clusters")
    records = embed(plain, plan, np.stack([rows[r][0].images[rows[r][1]] for r in own]))[0]
    suspects = np.array([r in named for r in own])
    center, axes = plane(records, suspects)
    chosen = [i for i, predicted in enumerate(finished.verdict.predicted) if predicted == label][:MAX_INPUTS]
    pictures = finished.scenario.test.images[finished.traced_inputs[chosen]]
    inputs = embed(plain, plan, finished.scenario.attack.stamp(pictures))[0]

    def point(reference: RecordRef, place: NDArray[np.float64]) -> Point:
        return Point(
            x=float(place[0]),
            y=float(place[1]),
            party=reference.party,
            suspicion=suspicion.get(reference, 0.0),
            suspect=reference in named,
            planted=finished.lineage.is_poisoned(reference),
        )

    places = (records - center) @ axes
    return Space(
        label=plan.data.classes[label],
        of=len(own),
        parted=parts(suspects),
        records=tuple(point(own[i], places[i]) for i in _sample(len(own))),
        inputs=tuple((float(x), float(y)) for x, y in (inputs - center) @ axes),
    )


def parts(suspects: NDArray[np.bool_]) -> bool:
    """Whether there are records to tell from the rest."""
    return bool(suspects.any() and not suspects.all())


def plane(fingerprints: NDArray[np.floating], suspects: NDArray[np.bool_]) -> Plane:
    """Origin (D,) and two directions (D, 2), at right angles and of length one, for fingerprints (N, D), N > 1, D > 1.

    The first goes from the mean of the others to that of `suspects` (N,), the second along what then differs most
    (principal component); with nothing to tell apart, both are principal components. Plain means, not Fisher's
    discriminant: with more dimensions than records that would part any records from any.
    """
    center = fingerprints.mean(0, dtype=np.float64)
    away = fingerprints - center
    axes = []
    if parts(suspects):
        first = away[suspects].mean(0) - away[~suspects].mean(0)
        axes.append(first / max(float(np.linalg.norm(first)), 1e-12))
        away = away - np.outer(away @ axes[0], axes[0])
    main = np.linalg.svd(away, full_matrices=False)[2]
    axes += [_upright(axis) for axis in main[: 2 - len(axes)]]
    return center, np.stack(axes, 1)


def _upright(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction or its opposite: the one whose largest number is positive, the same each time."""
    return axis if axis[np.abs(axis).argmax()] > 0 else -axis


def _sample(count: int) -> NDArray[np.int64]:
    """Rows to show, in order: all, or an even draw that is the same each time."""
    if count <= MAX_RECORDS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:MAX_RECORDS])
