"""The witnesses to the records' content, inside: learned in the pass over the pool, asked by the hunt and by verdicts.

Features are kept in half precision for as many records as there is room for. Those of the others are worked out again
from the pool, which is then read whole and in order: the host sees that more was asked than what is kept, never of
which records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.accountability.witness import (
    LeaveOut,
    PatchFeatures,
    RidgeWitness,
    WitnessBuilder,
    columns,
    draw_views,
)
from caltrain.crypto.kdf import derive
from caltrain.enclave.ingest import contributors_of, record_keys, unpack
from caltrain.enclave.pool import Pool, Rows
from caltrain.errors import UNCOMPUTABLE, IntegrityError
from caltrain.records.commitment import RecordRef
from caltrain.records.schema import DataSchema

Keys = NDArray[np.uint64]
_HELD = 1 << 30
_SAMPLE = 2048
_MOST_FILTERS, _LEAST_FILTERS, _RECORDS_A_FILTER = 128, 8, 8


@dataclass(frozen=True)
class Passed:
    """What the pass found of every record, in the pool's order.

    Where each is, and its commitment; fingerprints (N, D) and the lengths (N,) that they had as features, probabilities
    (N, C), labels and contributors (N,).
    """

    lines: list[tuple[RecordRef, bytes]]
    fingerprints: Tensor
    lengths: Tensor
    probabilities: Tensor
    labels: Tensor
    sources: Tensor


class Learning:
    """The witness in the making: takes the whole pool in, in order.

    Filters come from the pool's first records, which its last permutation has drawn. There are fewer of them where
    there are few records to learn from.
    """

    def __init__(self, pool: Pool, schema: DataSchema, *, contributors: int, seed: bytes) -> None:
        sample, _ = unpack(pool.rows(0, min(_SAMPLE, pool.shape.records)), schema)
        filters = min(_MOST_FILTERS, max(_LEAST_FILTERS, pool.shape.records // _RECORDS_A_FILTER))
        number = int.from_bytes(derive(seed, "witness/v1")[:4], "big")
        try:
            views = draw_views(sample, filters=filters, seed=number)
        except UNCOMPUTABLE:
            raise not_finite("contents") from None
        self._pool, self._schema = pool, schema
        self._builder = WitnessBuilder(views, contributors=contributors, classes=len(schema.classes))
        dims = sum(view.dims for view in views)
        room = min(pool.shape.records, _HELD // (2 * dims))
        self._held = torch.empty((room, dims), dtype=torch.float16)
        self._keys = np.empty(pool.shape.records, np.uint64)
        self._labels, self._sources = (torch.empty(pool.shape.records, dtype=torch.int32) for _ in range(2))
        self._taken = 0

    def add(self, rows: Rows, elements: Tensor, labels: Tensor) -> None:
        """The pool's next rows, with what is in them. Raises IntegrityError `hunt.not-finite`."""
        sources = contributors_of(rows)
        features = self._builder.add(elements, labels, sources)
        if not bool(features.isfinite().all()):
            raise not_finite("contents")
        here = slice(self._taken, self._taken + len(rows))
        kept = self._held[here]
        kept.copy_(features[: len(kept)])
        self._keys[here] = record_keys(rows)
        self._labels[here], self._sources[here] = labels, sources
        self._taken = here.stop

    def done(self) -> Contents:
        """The witness, once all rows are in."""
        order = np.argsort(self._keys)
        return Contents(
            pool=self._pool,
            schema=self._schema,
            views=self._builder.views,
            models=self._builder.done(),
            held=self._held,
            labels=self._labels,
            sources=self._sources,
            keys=self._keys[order],
            order=torch.from_numpy(order),
        )


@dataclass(frozen=True)
class Contents:
    """The witness over all records of a pool, by their rows there.

    `held` (H, dims) are the features of the first rows; `order` (N,) the rows by rising `keys` (`ingest.record_keys`).
    """

    pool: Pool
    schema: DataSchema
    views: tuple[PatchFeatures, ...]
    models: tuple[LeaveOut, ...]
    held: Tensor
    labels: Tensor
    sources: Tensor
    keys: Keys
    order: Tensor

    def rows(self, keys: Keys) -> Tensor:
        """Of each of these keys its record's row in the pool."""
        return self.order[torch.from_numpy(np.searchsorted(self.keys, keys))]

    def in_order(self, rows: Tensor) -> tuple[RidgeWitness, ...]:
        """Witnesses whose row i is row `rows[i]` of the pool."""
        labels, sources = self.labels[rows].long(), self.sources[rows].long()
        return tuple(
            RidgeWitness(partial(self._of, rows, view, own), labels, sources, model)
            for view, own, model in zip(self.views, columns(self.views), self.models, strict=True)
        )

    def _of(self, order: Tensor, view: PatchFeatures, own: slice, rows: Tensor) -> Tensor:
        """Features (R, dims) by a view of records `rows` (R,) of this order of the pool's rows.

        `own` are the view's columns of what is held.
        """
        rows = order[rows]
        found = torch.empty((len(rows), view.dims))
        here = rows < len(self.held)
        found[here] = self.held[rows[here], own].float()
        if not bool(here.all()):
            found[~here] = view.features(unpack(self._read(rows[~here]), self.schema)[0])
        return found

    def _read(self, rows: Tensor) -> Rows:
        """Rows of the pool, out of all that lie behind what is kept. Nothing is worked out before all is read."""
        shape, wanted = self.pool.shape, rows.numpy()
        found = np.empty((len(wanted), shape.row_bytes), np.uint8)
        for start, block in self._blocks():
            inside = (wanted >= start) & (wanted < start + len(block))
            found[inside] = block[wanted[inside] - start]
        return found

    def _blocks(self) -> Iterator[tuple[int, Rows]]:
        shape = self.pool.shape
        for start in range(len(self.held) // shape.block * shape.block, shape.records, shape.block):
            yield start, self.pool.rows(start, min(start + shape.block, shape.records))


def not_finite(what: str) -> IntegrityError:
    """What a hunt is refused with whose figures overflow."""
    return IntegrityError(
        "hunt.not-finite",
        f"the {what} of a record are not finite numbers",
        step="hunt",
        fix="Train again: the CenterNet, finite itself, overflows (the host may have made it so), or a record does.",
    )
