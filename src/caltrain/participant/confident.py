"""Confident learning on our own records, by `cleanlab`, outside the enclave (Northcutt, Jiang and Chuang, JAIR 2021).

The hunt's report says what fits that have not seen a record take it for; what its label is, our own shards say.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.boundary.sealed import LEFT_OUT, SuspicionReport
from caltrain.errors import UNCOMPUTABLE, IntegrityError
from caltrain.participant.hunt import Suspicious
from caltrain.participant.identity import Identity
from caltrain.participant.seal import own_labels
from caltrain.records.schema import DataSchema

_MOST_CLASSES = 1000  # cleanlab counts in tables of classes by classes
_ROUNDING = 1e-3  # what float16 may take from a sum of probabilities, or add to it

Outcome = Literal["found", "no-predictions", "not-installed", "no-labels", "not-computable"]


class Confident(msgspec.Struct, frozen=True, kw_only=True):
    """What cleanlab says of a party's records, or `why` it says nothing.

    `wrong` are those that it takes to be labelled wrongly, the least likely label first; `share` is how many of all
    `records` that were looked at. Both are cleanlab's, not the enclave's, estimates.
    """

    outcome: Outcome
    why: str = ""
    records: int = 0
    share: float | None = None
    wrong: tuple[Suspicious, ...] = ()


class _Own(NamedTuple):
    """Records with predictions: shard (by number) and leaf (n, 2), label (n,), class probabilities (n, C)."""

    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def confident_learning(identity: Identity, report: SuspicionReport, schema: Callable[[], DataSchema]) -> Confident:
    """Look for wrong labels in what the hunt reported of our records; the run's `schema` is asked for when needed.

    The labels are those in our sealed shards, by shard and leaf. Raises IntegrityError `hunt.other-records`,
    `hunt.not-probabilities` for a report that no honest enclave makes, and when our own shards are damaged.
    """
    if not report.out_of_fold:
        return _nothing(
            "no-predictions", "the report has no predictions: too many records and classes, or an older run"
        )
    if importlib.util.find_spec("cleanlab") is None:
        return _nothing("not-installed", "cleanlab is not installed: pip install 'caltrain[accountability]'")
    data = schema()
    labels = own_labels(identity, data, report.out_of_fold)
    if gone := sorted(report.out_of_fold.keys() - labels.keys()):
        return _nothing("no-labels", f"{len(gone)} of our shards are not here, the first is {gone[0]}")
    return _judged(_matched(report, labels, len(data.classes)), list(report.out_of_fold))


def _judged(own: _Own, shards: list[str]) -> Confident:
    """What cleanlab says of these records of `shards`, as far as it can say something."""
    records, classes = own.probabilities.shape
    if not records:
        return _nothing("no-predictions", "the enclave could not work out predictions for these records")
    if classes > _MOST_CLASSES:
        return _nothing("not-computable", f"there are {classes} classes, cleanlab is given {_MOST_CLASSES} at most")
    if len(set(own.labels.tolist())) < 2:
        return _nothing("not-computable", "all our records are of one class")
    issues = _issues(own)
    if issues is None:
        return _nothing("not-computable", "cleanlab cannot work with these records")
    doubt = 1 - own.probabilities[np.arange(records), own.labels]
    wrong = [Suspicious(shards[own.places[i, 0]], int(own.places[i, 1]), round(float(doubt[i]), 3)) for i in issues]
    return Confident(outcome="found", records=records, share=round(len(wrong) / records, 3), wrong=tuple(wrong))


def _nothing(outcome: Outcome, why: str) -> Confident:
    return Confident(outcome=outcome, why=why)


def _matched(report: SuspicionReport, labels: dict[str, NDArray[np.int64]], classes: int) -> _Own:
    """Labels and predictions of all our records that have some, by shard and leaf."""
    parts = []
    for number, (shard, raw) in enumerate(report.out_of_fold.items()):
        known, probabilities = _decoded(shard, raw, records=len(labels[shard]), classes=classes)
        leaves = known.nonzero()[0]
        places = np.stack((np.full(len(leaves), number), leaves), 1)
        parts.append(_Own(places, labels[shard][leaves], probabilities))
    return _Own(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _decoded(shard: str, raw: bytes, *, records: int, classes: int) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which records of a shard (n,) have predictions, and those (m, C)."""
    if len(raw) != 2 * classes * records:
        raise _refused("hunt.other-records", f"{len(raw)} bytes for {records} records of shard {shard}")
    bits = np.frombuffer(raw, "<u2").reshape(records, classes)
    known = (bits != LEFT_OUT).any(1)
    with np.errstate(invalid="ignore"):
        found = bits[known].view("<f2").astype(np.float32)
    within = ((found >= 0) & (found <= 1)).all(1)  # NaN is neither
    if not within.all() or (np.abs(found.sum(1) - 1) > _ROUNDING).any():
        raise _refused("hunt.not-probabilities", f"shard {shard} has what is no share of one")
    return known, found


def _issues(own: _Own) -> NDArray[np.int64] | None:
    """Records that cleanlab calls wrongly labelled, the one with the least likely label first; None where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of classes with few records: it finds little there
        from cleanlab.filter import find_label_issues  # noqa: PLC0415  # takes seconds, and 150 MiB

        try:
            found = find_label_issues(
                own.labels, own.probabilities, n_jobs=1, return_indices_ranked_by="self_confidence"
            )
        except UNCOMPUTABLE:
            return None
    return np.asarray(found, np.int64)


def _refused(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code,
        f"the predictions in the hunt's report were refused: {what}",
        step="read hunt",
        fix="Trust nothing in it: an honest enclave does not report this. Use the shards and the plan of this run.",
    )
