"""Rows of one class in the enclave's memory, and which of them count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.accountability.planes import Planes, Splitting
from caltrain.accountability.segments import Columns, Source
from caltrain.records.commitment import RecordRef

_SMALL = 1 << 16  # rows: smaller shelves are joined
Words = NDArray[np.uint32]
Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]


class Sources:
    """Every shard that a store knows, by a number; a record is then one of 64 bits: shard and leaf."""

    def __init__(self) -> None:
        self.known: list[Source] = []
        self._number: dict[Source, int] = {}

    def add(self, sources: Iterable[Source]) -> None:
        """Know these too."""
        for source in sources:
            if source not in self._number:
                self._number[source] = len(self.known)
                self.known.append(source)

    def numbers(self, sources: Sequence[Source], places: Words) -> Words:
        """Numbers here, of places in a segment's own list."""
        return np.array([self._number[source] for source in sources], np.uint32)[places]

    def keys(self, records: Sequence[RecordRef]) -> Keys:
        """One number a record. A shard that is not known has one that no record of a shelf has."""
        strange = len(self.known)
        places = [self._number.get((record.party, record.shard), strange) for record in records]
        return keys(np.array(places, np.uint32), np.array([record.leaf for record in records], np.uint32))

    def reference(self, source: int, leaf: int) -> RecordRef:
        """The record of these numbers."""
        party, shard = self.known[source]
        return RecordRef(party, shard, leaf)


@dataclass(frozen=True)
class Removed:
    """Records that count no longer in segments before `until`: keys, rising."""

    keys: Keys
    until: NDArray[np.int64]

    @classmethod
    def of(cls, removals: Iterable[tuple[Keys, int]]) -> Removed:
        """From the keys that each removal names and its number, in order."""
        last: dict[int, int] = {}
        for named, number in removals:
            last.update(dict.fromkeys(named.tolist(), number))
        ordered = sorted(last)
        return cls(np.array(ordered, np.uint64), np.array([last[key] for key in ordered], np.int64))

    def hits(self, rows: Keys, segment: Words) -> Mask:
        """Which rows of these segments count no longer."""
        if not len(self.keys):
            return np.zeros(len(rows), bool)
        at = np.minimum(np.searchsorted(self.keys, rows), len(self.keys) - 1)
        return np.asarray((self.keys[at] == rows) & (segment < self.until[at]))


@dataclass(frozen=True)
class Shelf:
    """Rows of one class: 2 bytes a dimension and 56 more a record. Nothing of it is changed once it is made."""

    planes: Planes
    source: Words
    leaf: Words
    segment: Words
    commitments: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.leaf)

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        beside = (self.source, self.leaf, self.segment, self.commitments)
        return self.planes.nbytes + sum(column.nbytes for column in beside)

    def live(self, removed: Removed) -> Shelf:
        """The rows that count."""
        gone = removed.hits(keys(self.source, self.leaf), self.segment)
        if not gone.any():
            return self
        planes = self.planes.without(torch.from_numpy(gone))
        return Shelf(planes, self.source[~gone], self.leaf[~gone], self.segment[~gone], self.commitments[~gone])


def keys(source: Words, leaf: Words) -> Keys:
    """One number a record."""
    return np.asarray((source.astype(np.uint64) << np.uint64(32)) | leaf)


class Filling:
    """Rows of one class on their way to a shelf: as many as it is made for, in any portions."""

    def __init__(self, capacity: int, dims: int) -> None:
        """For at most `capacity` rows."""
        self._planes = Splitting(capacity, dims)
        self._source, self._leaf, self._segment = (np.empty(capacity, np.uint32) for _ in range(3))
        self._commitments = np.empty((capacity, 32), np.uint8)
        self._filled = 0

    def add(self, segment: int | Words, source: Words, columns: Columns) -> None:
        """Rows of a segment (or of one each), with the numbers of their sources."""
        here = slice(self._filled, self._filled + len(source))
        self._planes.add(columns.fingerprints)
        self._source[here], self._leaf[here], self._segment[here] = source, columns.leaf, segment
        self._commitments[here] = columns.commitments
        self._filled = here.stop

    def shelf(self) -> Shelf:
        """All of it."""
        n = self._filled
        return Shelf(self._planes.done(), self._source[:n], self._leaf[:n], self._segment[:n], self._commitments[:n])


def with_last(shelves: tuple[Shelf, ...], more: Shelf) -> tuple[Shelf, ...]:
    """A shelf behind others. Small ones are joined, so that there are never many."""
    if not shelves or len(shelves[-1]) + len(more) > _SMALL:
        return (*shelves, more)
    joined = Filling(len(shelves[-1]) + len(more), more.planes.dims)
    for each in (shelves[-1], more):
        columns = Columns(each.planes.rows(), each.source, each.leaf, each.commitments)
        joined.add(each.segment, each.source, columns)
    return (*shelves[:-1], joined.shelf())
