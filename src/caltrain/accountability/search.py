"""Exact nearest neighbours by L2 over stored fingerprints: a scan of their first bits, then proof, then the whole.

The scan gives each row a lower bound of its distance: what the bits that were not read can change is bounded by
Cauchy and Schwarz, what the kernel's bfloat16 can change by its rounding. Only rows whose bound is below the k-th
distance found so far are looked at further, first with 12 bits, then with all, in float64. So the answer is that of
a scan of everything in float64, whatever the data; data decide how many rows are looked at twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from caltrain.accountability.planes import GRID, Planes, fine_steps
from caltrain.errors import DataError

_BLOCK = 1 << 20  # rows of one call of the kernel: each call waits for the slowest thread
_AT_ONCE = 8  # queries of one call
_PASS = 1 << 22  # rows whose scores are kept at once
_LOOK = 1 << 14  # rows that are looked at again at once
_EXACT = 16
_FINITE = torch.finfo(torch.float32).max
_ROUNDING = 2.0**-23
_OUTPUT = 2.0**-8 * 1.01  # what rounding a result to bfloat16 can do, of its size


@dataclass
class Found:
    """The nearest so far of one query: places and squared distances (float64), nearest first, ties by place."""

    k: int
    places: Tensor
    squares: Tensor

    @classmethod
    def none(cls, k: int) -> Found:
        """Nothing yet."""
        return cls(k, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))

    @property
    def bound(self) -> float:
        """A row farther than this is not among the nearest."""
        return float(self.squares[-1]) if len(self.squares) == self.k else float("inf")

    def add(self, places: Tensor, squares: Tensor) -> None:
        """Take these rows into account; each is given once, places rise from call to call or are sorted here."""
        places, squares = torch.cat((self.places, places)), torch.cat((self.squares, squares))
        by_place = torch.argsort(places)
        order = by_place[torch.argsort(squares[by_place], stable=True)][: self.k]
        self.places, self.squares = places[order], squares[order]

    @property
    def distances(self) -> Tensor:
        """L2 distances, nearest first."""
        return self.squares.sqrt()


def nearest(
    queries: Tensor, parts: Sequence[Planes], *, k: int, keep: Sequence[Tensor | None] | None = None
) -> list[Found]:
    """For each query (Q, D) the `k` nearest rows of all `parts`, which count as one after the other.

    `keep` says for each part which rows (N,) count at all, None for all of them. Fewer than `k` are found where there
    are fewer rows. Raises DataError `search.query` for queries of another shape or longer than 2, and `search.bounds`
    for k below 1.
    """
    if k < 1:
        raise _refuse("search.bounds", f"{k} neighbours were asked for", "Ask for at least one.")
    wanted = queries.double()
    if wanted.ndim != 2 or any(wanted.shape[1] != part.dims for part in parts):
        raise _refuse("search.query", f"a query of the shape {tuple(queries.shape)}", "Give fingerprints of the model.")
    if not bool((wanted.norm(dim=1) <= 2).all()):  # bounds are worked out in float32; NaN is not
        raise _refuse("search.query", "a query that is longer than 2, or no number", "Give rows of length one.")
    found = [Found.none(k) for _ in wanted]
    first = 0
    for part, kept in zip(parts, keep or [None] * len(parts), strict=True):
        for start in range(0, len(part), _PASS):
            rows = slice(start, min(start + _PASS, len(part)))
            some = None if kept is None else kept[rows]
            for at in range(0, len(wanted), _AT_ONCE):
                _scan(wanted[at : at + _AT_ONCE], part, rows, some, first, found[at : at + _AT_ONCE])
        first += len(part)
    return found


def _scan(queries: Tensor, part: Planes, rows: slice, keep: Tensor | None, first: int, found: list[Found]) -> None:
    """Take the rows of a part into account, for a few queries."""
    looks = [_Look(query, part) for query in queries]
    coarse = torch.stack([look.coarse for look in looks])
    group = next(size for size in (256, 128, 64, 32) if part.width % size == 0)
    scores = torch.empty((len(looks), rows.stop - rows.start))
    for start in range(rows.start, rows.stop, _BLOCK):
        stop = min(start + _BLOCK, rows.stop)
        high = part.high[start : start + _BLOCK]
        products = torch._weight_int4pack_mm_for_cpu(coarse, high, group, _scales(part.width // group, len(high)))
        for look, product, score in zip(looks, products, scores, strict=True):
            look.score(slice(start, stop), product[: stop - start], score[start - rows.start : stop - rows.start])
    for look, score, nearest_yet in zip(looks, scores, found, strict=True):
        look.settle(score, rows.start, keep, first, nearest_yet)


@lru_cache(maxsize=4)
def _scales(groups: int, rows: int) -> Tensor:
    """What the kernel is to make of four bits: their number, and a half for the middle of what they leave open."""
    return torch.tensor([1, 0.5], dtype=torch.bfloat16).repeat(groups, rows, 1)


class _Look:
    """One query against one part."""

    def __init__(self, query: Tensor, part: Planes) -> None:
        self.part, self.query = part, query
        away = torch.zeros(part.width, dtype=torch.float64)
        away[: part.dims] = query - part.center.double() * GRID
        self.coarse, self.total = away.bfloat16(), float(away.sum())
        self.length = float(away.norm()) * (1 + 1e-6)
        # Of an inner product, by the length of its row: the query's rounding, the sum's.
        self.lost = float((away - self.coarse.double()).norm()) + (part.width + 16) * _ROUNDING * self.length
        size = (self.length + part.reach) ** 2
        self.margin = (2 * self.lost * part.reach + 32 * _ROUNDING * size) * (1 + 1e-6) - self.length**2 * (1 - 4e-6)

    def score(self, here: slice, product: Tensor, out: Tensor) -> None:
        """Of the rows `here`, given their products with the first plane: distance, as far as those tell."""
        # Rounded up for what the kernel's output lost: more where it is above zero, less where it is below.
        above = torch.nn.functional.leaky_relu(product.float(), (1 - _OUTPUT) / (1 + _OUTPUT))
        part = self.part
        torch.addcmul(part.energy[here], above, part.step[here], value=-2 * GRID * (1 + _OUTPUT), out=out)

    def settle(self, score: Tensor, start: int, keep: Tensor | None, first: int, found: Found) -> None:
        """Take rows from `start` on into account, given their scores."""
        if keep is not None:
            score[~keep] = torch.inf
        seeds = _lowest(score, found.k)
        self._exact(seeds + start, first, found)
        score[seeds] = torch.inf  # they are counted
        spread = self.part.spread[start : start + len(score)]
        bound = score.add_(spread, alpha=-2 * self.length)
        rows = (bound <= min(found.bound + self.margin, _FINITE)).nonzero().squeeze(1)
        for at in range(0, len(rows), _LOOK):
            some = rows[at : at + _LOOK]
            self._refine(some + start, torch.add(bound[some], spread[some], alpha=2 * self.length), first, found)

    def _refine(self, rows: Tensor, score: Tensor, first: int, found: Found) -> None:
        """Look at rows with 12 bits, and at those that may still be among the nearest with all."""
        part, steps = self.part, self.part.step[rows]
        fine = fine_steps(steps)
        ones = torch.ones(len(rows), dtype=torch.bfloat16)
        product = torch._weight_int8pack_mm(self.coarse[None], part.middle.index_select(0, rows), ones)[0].float()
        # What the first plane took for the middle of a step was `steps / 2`; here it is the middle of a finer one.
        more = product * fine + (128.5 * fine - 0.5 * steps) * self.total
        length = part.width**0.5 * (self.length * (0.5 + 128 * _OUTPUT) + 129 * self.lost) * (1 + 1e-5)
        bound = score - (2 * GRID) * (more + fine * length)
        near = (bound <= found.bound + self.margin).nonzero().squeeze(1)
        bound, order = torch.sort(bound[near])
        for at in range(0, len(near), _EXACT):
            if bound[at] > found.bound + self.margin:
                break
            self._exact(rows[near[order[at : at + _EXACT]]], first, found)

    def _exact(self, rows: Tensor, first: int, found: Found) -> None:
        found.add(rows + first, (self.part.exact(rows) - self.query).square().sum(1))


def _lowest(score: Tensor, k: int) -> Tensor:
    """Places of `k` low scores, not of the lowest in any case: the lowest of each of `k` groups. Infinite ones not."""
    groups = max(1, min(len(score), 16 * k, 4096))
    size = len(score) // groups
    lowest = score[: groups * size].view(groups, size).min(dim=1)
    best = torch.topk(lowest.values, min(k, groups), largest=False)
    places = best.indices * size + lowest.indices[best.indices]
    return places[best.values.isfinite()]


def _refuse(code: str, what: str, fix: str) -> DataError:
    return DataError(code, what, step="search fingerprints", fix=fix)
