"""Whether the records near some mispredictions are one contributor's more often than its share of the class.

The order of records is worked out without looking at whose they are, so under the null that blame falls by share of
data every prefix of it is a draw without replacement, and how many of a contributor it holds is hypergeometric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

SMALLEST = 5
"""A neighbourhood of fewer records proves nothing against anybody."""
_NEAR = 3
_AT_ONCE = 1 << 16
_SHRINK = 0.1


@dataclass(frozen=True)
class Look:
    """The neighbourhood in which a contributor is most beyond its share: how many records, how many are its own."""

    contributor: int
    size: int
    own: int
    p_value: float
    """Corrected for the neighbourhoods and orders that were looked at."""


def orders(queries: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Two ways to say how near (n,) the records `rows` (n, D) are to `queries` (q, D); smaller is nearer.

    The mean distance to the nearest three queries, and the place on the line that tells the queries from the class as
    a whole (Fisher's discriminant, shrunk): the first finds what lies close, the second what leans the same way.
    """
    return _distance(queries, rows), -rows @ _direction(queries, rows)


def scan(order: tuple[Tensor, ...], suspected: Tensor, sources: Tensor, *, contributors: int) -> tuple[Look, ...]:
    """For every contributor its strongest look.

    `order` are values (n,), smaller is nearer; only rows that are `suspected` (n,) are counted, against shares of all
    rows. `sources` (n,).
    """
    share = np.bincount(sources.numpy(), minlength=contributors)
    found = [Look(c, 0, 0, 1.0) for c in range(contributors)]
    for values in order:
        near = sources[suspected][torch.argsort(values[suspected], stable=True)].numpy()
        sizes = _sizes(len(near))
        for look in (_strongest(near == c, sizes, len(sources), int(share[c]), c) for c in range(contributors)):
            p_value = min(1.0, look.p_value * len(sizes) * len(order))
            if p_value < found[look.contributor].p_value:
                found[look.contributor] = replace(look, p_value=p_value)
    return tuple(found)


def strongest(looks: Sequence[Sequence[Look]]) -> tuple[Look, ...]:
    """Of several scans of the same contributors each one's strongest look, corrected for there being several."""
    return tuple(
        replace(best, p_value=min(1.0, best.p_value * len(looks)))
        for best in (min(each, key=lambda look: look.p_value) for each in zip(*looks, strict=True))
    )


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's correction (1979) of p-values (n,), in their order."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * (len(p_values) - np.arange(len(p_values))))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted


def _strongest(own: NDArray[np.bool_], sizes: NDArray[np.int64], total: int, share: int, contributor: int) -> Look:
    if not len(sizes):
        return Look(contributor, 0, 0, 1.0)
    counts = np.cumsum(own)[sizes - 1]
    p_values = hypergeom.sf(counts - 1, total, share, sizes)
    best = int(np.argmin(p_values))
    return Look(contributor, int(sizes[best]), int(counts[best]), float(p_values[best]))


def _sizes(most: int) -> NDArray[np.int64]:
    """Neighbourhoods to look at: 5, and each half as large again as the one before."""
    steps = int(np.log(max(most, 1) / SMALLEST) / np.log(1.5)) + 1 if most >= SMALLEST else 0
    return np.unique((SMALLEST * 1.5 ** np.arange(steps)).astype(np.int64))


def _distance(queries: Tensor, rows: Tensor) -> Tensor:
    near = [
        torch.cdist(part, queries).topk(min(_NEAR, len(queries)), largest=False).values.mean(1)
        for part in torch.split(rows, _AT_ONCE)
    ]
    return torch.cat(near)


def _direction(queries: Tensor, rows: Tensor) -> Tensor:
    away = rows - rows.mean(0)
    spread = away.T @ away / max(1, len(rows) - 1)
    spread = spread + _SHRINK * spread.diagonal().mean().clamp_min(1e-12) * torch.eye(len(spread))
    direction: Tensor = torch.linalg.solve(spread, queries.mean(0) - rows.mean(0))
    return direction
