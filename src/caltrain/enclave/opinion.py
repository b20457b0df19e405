"""Second opinions: a trace by another method than fingerprints, over what the pass over the pool kept for it.

Only ranks are told. Scores would say how much the model doubts a record, and that tells who was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from caltrain.accountability.attribution import AT_ONCE, Attribution, GradientDot, Records, Seen, Trak
from caltrain.boundary.sealed import Neighbour, Question
from caltrain.crypto.digests import to_text
from caltrain.enclave.contents import Passed
from caltrain.enclave.evidence import MOST_BYTES, evidence
from caltrain.enclave.linkage import Table, Where
from caltrain.enclave.run import Run, present
from caltrain.errors import UNCOMPUTABLE, DataError
from caltrain.plan import Method

RIDGE = 1.0
"""With little of it a record that was trained on stands out against all others, and its trace tells that it was."""
_SCORES = 1 << 26  # worked out at once
_MADE: dict[Method, Callable[[Records], Attribution]] = {"gradient": GradientDot, "trak": partial(Trak, ridge=RIDGE)}


@dataclass(frozen=True)
class Outputs:
    """What the model makes of every record beside its fingerprint, in the pool's order: 4 + 2 C bytes each.

    Lengths (N,) of the features; logarithms (N, C) of the probabilities, in float16: these tell how sure it is where
    probabilities of so few digits would all be 1.
    """

    lengths: Tensor
    logarithms: Tensor


def outputs(run: Run, passed: Passed) -> Outputs | None:
    """What is kept where the plan has second opinions; nothing where all that they need would not fit into memory."""
    records, dims = passed.fingerprints.shape
    a_record = 4 * dims + 4 + 2 * passed.probabilities.shape[1]
    if not present(run.plan).trace.opinions or records * a_record > MOST_BYTES:
        return None
    return Outputs(passed.lengths, passed.probabilities.log().half())


@dataclass(frozen=True)
class _Linked:
    """The linked records as the last layer saw them; unpacked a block at a time."""

    table: Table
    rows: Tensor
    outputs: Outputs

    def blocks(self) -> Iterator[Seen]:
        """As `Records.blocks`."""
        for start in range(0, len(self.rows), AT_ONCE):
            here = slice(start, start + AT_ONCE)
            rows = self.rows[here]
            features = self.table.fingerprints[here] * self.outputs.lengths[rows, None]
            yield Seen(features, self.outputs.logarithms[rows].float().exp(), self.table.labels[here])


def opinions(run: Run, question: Question, asked: Seen, where: Where) -> list[tuple[Neighbour, ...]]:
    """For each input the records that speak most for its prediction: of its class unless any counts.

    Those that speak against it are not named. Raises DataError `opinion.not-computable`.
    """
    table, k = evidence(run).table, present(run.plan).trace.neighbours
    counted = torch.from_numpy(_of_contributors(table, where))
    if not bool(counted.any()):
        return [()] * len(asked)
    found: list[tuple[Neighbour, ...]] = []
    at_once = max(1, _SCORES // len(counted))
    for start in range(0, len(asked), at_once):
        part = asked.rows(slice(start, start + at_once))
        for label, scores in zip(part.labels.tolist(), _scores(run, question.method, part), strict=True):
            counts = counted if question.any_label else counted & (table.labels == label)
            found.append(_named(table, _first(scores.where(counts, 0.0), k)))
    return found


def _scores(run: Run, method: Method, asked: Seen) -> Tensor:
    """Of each record for each input (Q, N). What a method makes of all records is made once."""
    all_ = evidence(run)
    try:
        if method not in all_.opinions:
            all_.opinions[method] = _MADE[method](_Linked(all_.table, all_.rows, present(run.outputs)))
        scores = all_.opinions[method].scores(asked)
    except UNCOMPUTABLE:
        raise _not_computable() from None
    if not bool(scores.isfinite().all()):
        raise _not_computable()
    return scores


def _of_contributors(table: Table, where: Where) -> np.ndarray:
    named = where.contributors
    of_source = np.array([named is None or party in named for party, _ in table.shards])
    return np.asarray(of_source[table.source])


def _first(scores: Tensor, k: int) -> list[int]:
    """Rows of the `k` highest scores above zero, highest first, ties in their order."""
    least = scores.topk(min(k, len(scores))).values[-1]
    rows = ((scores >= least) & (scores > 0)).nonzero().squeeze(1)
    order = scores[rows].argsort(descending=True, stable=True)[:k]
    return rows[order].tolist()


def _named(table: Table, rows: list[int]) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(
            rank=rank,
            record=table.record(row),
            label=int(table.labels[row]),
            distance=None,
            commitment=to_text(table.commitments[row].tobytes()),
            unusual=None,
        )
        for rank, row in enumerate(rows, 1)
    )


def not_kept() -> DataError:
    """What a second opinion is refused with in a run that is too large for it."""
    return DataError(
        "opinion.too-large",
        f"what second opinions need of this run's records takes more than {MOST_BYTES} bytes",
        step="query",
        fix="Ask for a trace by fingerprints.",
    )


def _not_computable() -> DataError:
    return DataError(
        "opinion.not-computable",
        "the figures of this method cannot be worked out for these records and inputs",
        step="query",
        fix="Ask for a trace by fingerprints.",
    )
