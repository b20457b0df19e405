"""From a few suspected records of a class to all of a kind with them: a discriminant that is fitted to its own finds.

Each round tells the suspects found so far from the rest of the class, by fingerprint and by what the witness makes of
their label, and takes those of the accused's records that fall on their side. Every record is judged by a fit without
it (five folds), so the share of the others' records that fall there as well says how many honest ones are among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from caltrain.accountability.cases import Suspects

_FOLDS = 5
_ROUNDS = 12
_SHRINK = 0.1
_FLOOR = 1e-4
_LEAST = 1e-9
CERTAIN = 2.94
"""Log odds of 0.95: what it takes to accuse a record."""


def grow(fingerprints: Tensor, doubt: Tensor, *, seeds: Tensor, accused: Tensor) -> tuple[Suspects, Tensor]:
    """All records of `accused` (n,) that are like the `seeds` (n,), as row numbers of the class.

    And the row numbers of all that are not cleared: these, and those of whom it is not certain that they are unlike.

    `fingerprints` (n, D), `doubt` (n,): how much the witness doubts each label. Both masks are boolean.
    """
    columns = torch.cat((fingerprints, doubt[:, None]), 1)
    columns = (columns - columns.mean(0)) / columns.std(0, correction=0).clamp_min(1e-6)
    folds = _folds(columns)
    found = seeds & accused
    seen: list[Tensor] = []
    for _ in range(_ROUNDS):
        odds = _odds(columns, found, folds)
        now = accused & (odds > 0)
        if not now.any() or any(torch.equal(now, before) for before in seen):
            break
        seen.append(found)
        found = now
    suspects = _suspects(accused & (odds > CERTAIN), odds > CERTAIN, accused)
    return suspects, (accused & (odds > -CERTAIN)).nonzero().squeeze(1)


def none() -> Suspects:
    """No records."""
    return Suspects(torch.empty(0, dtype=torch.int64), 0.0, 0.0, 0.0)


def together(found: Sequence[Suspects]) -> Suspects:
    """Suspects of several classes, and of one before several witnesses, as one."""
    total = sum(len(each.rows) for each in found)
    if not total:
        return none()

    def mean(values: Iterable[float]) -> float:
        return sum(len(each.rows) * value for each, value in zip(found, values, strict=True)) / total

    return Suspects(
        torch.unique(torch.cat([each.rows for each in found])),
        mean(each.precision for each in found),
        mean(each.low for each in found),
        mean(each.high for each in found),
    )


def _suspects(found: Tensor, like: Tensor, accused: Tensor) -> Suspects:
    others, honest = int((~accused).sum()), int((accused & ~found).sum())
    stray, size = int((like & ~accused).sum()), int(found.sum())
    high = float(beta.ppf(0.975, stray + 1, max(1, others - stray))) if others else 1.0
    low = float(beta.ppf(0.025, stray, others - stray + 1)) if stray else 0.0
    rate = stray / others if others else 1.0

    def precision(rate: float) -> float:
        # The accused's honest records fall among the suspects as often as the others' do.
        return max(0.0, 1 - rate * honest / (1 - min(rate, 0.999)) / size) if size else 0.0

    return Suspects(found.nonzero().squeeze(1), precision(rate), precision(high), precision(low))


def _folds(columns: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Which rows (n,) are out of each fold, and X^T X (D, D) of the others: the same in every round."""
    outs = [torch.arange(len(columns)) % _FOLDS == number for number in range(_FOLDS)]
    return [(out, columns[~out].T @ columns[~out]) for out in outs]


def _odds(columns: Tensor, found: Tensor, folds: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Log odds (n,) of belonging to `found`, by Fisher's discriminant, shrunk; each row by other rows."""
    odds = torch.empty(len(columns))
    for out, gram in folds:
        yes, no = columns[found & ~out], columns[~found & ~out]
        if len(yes) < 2 or len(no) < 2:
            odds[out] = torch.where(found[out], 1.0, -1.0)
            continue
        odds[out] = fisher(yes, no, columns[out], gram=gram)
    return odds


def fisher(yes: Tensor, no: Tensor, rows: Tensor, *, gram: Tensor | None = None) -> Tensor:
    """Log odds (r,) that `rows` (r, D) belong with `yes` (at least two) and not with `no` (at least two).

    `gram` is X^T X (D, D) of both together, where that is known.
    """
    if gram is None:
        gram = yes.T @ yes + no.T @ no
    count = len(yes) + len(no)
    spread = (gram - sum(len(side) * torch.outer(side.mean(0), side.mean(0)) for side in (yes, no))) / count
    spread = spread + _SHRINK * spread.diagonal().mean().clamp_min(_LEAST) * torch.eye(len(spread))
    weights = torch.linalg.solve(spread, yes.mean(0) - no.mean(0))
    # Shrinking makes the line's own scale wrong: its two ends are measured again, as two normal distributions.
    return _normal(rows @ weights, yes @ weights, len(yes)) - _normal(rows @ weights, no @ weights, len(no))


def _normal(values: Tensor, of: Tensor, count: int) -> Tensor:
    spread = of.std().clamp_min(_FLOOR)
    return float(np.log(count)) - spread.log() - ((values - of.mean()) / spread).square() / 2
