"""Exact nearest neighbours by L2 over stored fingerprints: a scan of their first bits, then proof, then the whole.

The scan gives each row a lower bound of its distance: what the bits that were not read can change is bounded by
Cauchy and Schwarz, what the kernel's bfloat16 can change by its rounding. Only rows whose bound is below the k-th
distance found so far are looked at further, first with 12 bits, then with all, in float64. So the answer is that of
a scan of everything in float64, whatever the data; data decide how many rows are looked at twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caltrain.accountability.planes import GRID, Planes, fine_steps
from caltrain.errors import DataError

_BLOCK = 1 << 17  # rows of one call of the kernel
_AT_ONCE = 8  # queries of one call
_LOOK = 1 << 12  # rows that are taken apart at once
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
    are fewer rows. Raises DataError `search.query` for queries of another shape or not finite, `search.bounds` for k
    below 1.
    """
    if k < 1:
        raise _refuse("search.bounds", f"{k} neighbours were asked for", "Ask for at least one.")
    wanted = queries.double()
    if wanted.ndim != 2 or any(wanted.shape[1] != part.dims for part in parts) or not bool(wanted.isfinite().all()):
        raise _refuse("search.query", f"a query of the shape {tuple(queries.shape)}", "Give finite fingerprints.")
    found = [Found.none(k) for _ in wanted]
    first = 0
    for part, kept in zip(parts, keep or [None] * len(parts), strict=True):
        for start in range(0, len(wanted), _AT_ONCE):
            _scan(wanted[start : start + _AT_ONCE], part, kept, first, found[start : start + _AT_ONCE])
        first += len(part)
    return found


def _scan(queries: Tensor, part: Planes, keep: Tensor | None, first: int, found: list[Found]) -> None:
    looks = [_Look(query, part) for query in queries]
    coarse = torch.stack([look.coarse for look in looks])
    group = next(size for size in (256, 128, 64, 32) if part.width % size == 0)
    whole = torch.ones((part.width // group, min(_BLOCK, len(part.high)), 2), dtype=torch.bfloat16)
    whole[..., 1] = 0.5  # the middle of what the first four bits leave open
    for start in range(0, len(part), _BLOCK):
        stop = min(start + _BLOCK, len(part))
        high = part.high[start : start + _BLOCK]
        scales = whole[:, : len(high)].contiguous()
        products = torch._weight_int4pack_mm_for_cpu(coarse, high, group, scales)[:, : stop - start]
        kept = None if keep is None else keep[start:stop]
        for look, product, nearest_yet in zip(looks, products, found, strict=True):
            look.block(start, product.float(), kept, first, nearest_yet)


class _Look:
    """One query against one part: its bounds, and what it does with a block's inner products."""

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

    def block(self, start: int, product: Tensor, keep: Tensor | None, first: int, found: Found) -> None:
        """Take a block of rows from `start` on into account, given their products with the first plane."""
        here = slice(start, start + len(product))
        part = self.part
        # Rounded up for what the kernel's output lost: more where it is above zero, less where it is below.
        above = torch.nn.functional.leaky_relu(product, (1 - _OUTPUT) / (1 + _OUTPUT))
        score = torch.addcmul(part.energy[here], above, part.step[here], value=-2 * GRID * (1 + _OUTPUT))
        if keep is not None:
            score = torch.where(keep, score, torch.inf)
        seeds = self._seed(score, start, first, found)
        bound = torch.add(score, part.spread[here], alpha=-2 * self.length)
        rows = (bound <= found.bound + self.margin).nonzero().squeeze(1)
        if keep is not None:  # before there is a bound at all, infinity is not beyond it
            rows = rows[keep[rows]]
        rows = rows[~torch.isin(rows + start, seeds)]
        for at in range(0, len(rows), _LOOK):
            some = rows[at : at + _LOOK]
            self._refine(some + start, score[some], first, found)

    def _seed(self, score: Tensor, start: int, first: int, found: Found) -> Tensor:
        """Where there is no bound yet: the rows that look nearest, exactly."""
        if len(found.squares) == found.k:
            return torch.empty(0, dtype=torch.int64)
        best = torch.topk(score, min(found.k, len(score)), largest=False)
        rows = best.indices[best.values.isfinite()] + start
        self._exact(rows, first, found)
        return rows

    def _refine(self, rows: Tensor, score: Tensor, first: int, found: Found) -> None:
        part, steps = self.part, self.part.step[rows]
        fine = fine_steps(steps)
        ones = torch.ones(len(rows), dtype=torch.bfloat16)
        product = torch._weight_int8pack_mm(self.coarse[None], part.middle[rows], ones)[0].float()
        # What the first plane took for the middle of a step was `steps / 2`; here it is the middle of a finer one.
        more = product * fine + (128.5 * fine - 0.5 * steps) * self.total
        length = part.width**0.5 * (self.length * (0.5 + 128 * _OUTPUT) + 129 * self.lost) * (1 + 1e-5)
        bound = score - (2 * GRID) * (more + fine * length)
        bound, order = torch.sort(bound)
        for some in torch.split(torch.arange(len(rows)), max(found.k, 16)):
            if bound[some[0]] > found.bound + self.margin:
                break
            self._exact(rows[order[some]], first, found)

    def _exact(self, rows: Tensor, first: int, found: Found) -> None:
        found.add(rows + first, (self.part.exact(rows) - self.query).square().sum(1))


def _refuse(code: str, what: str, fix: str) -> DataError:
    return DataError(code, what, step="search fingerprints", fix=fix)
