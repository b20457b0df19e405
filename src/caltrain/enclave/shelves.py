"""Rows of one class in the enclave's memory, and which of them count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.accountability.planes import Planes
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
    """Rows of one class on their way to shelves. Small shelves are joined, so that there are never many."""

    def __init__(self, before: tuple[Shelf, ...] = ()) -> None:
        """Go on after the shelves that there are."""
        self._done = list(before)
        self._waiting: list[tuple[int, Words, Columns]] = []

    def add(self, segment: int, source: Words, columns: Columns) -> None:
        """Rows of a segment, with the numbers of their sources."""
        self._waiting.append((segment, source, columns))
        if sum(len(rows.leaf) for _, _, rows in self._waiting) >= _SMALL:
            self._done.append(_shelf(self._waiting))
            self._waiting = []

    def shelves(self) -> tuple[Shelf, ...]:
        """All of them, with what still waited."""
        if self._waiting:
            last = self._done.pop() if self._done and len(self._done[-1]) < _SMALL else None
            self._done.append(_shelf(self._waiting, after=last))
            self._waiting = []
        return tuple(self._done)


def _shelf(parts: Sequence[tuple[int, Words, Columns]], *, after: Shelf | None = None) -> Shelf:
    first = [after] if after else []
    segment = [np.full(len(columns.leaf), number, np.uint32) for number, _, columns in parts]
    return Shelf(
        Planes.of(torch.cat([*(s.planes.rows() for s in first), *(c.fingerprints for _, _, c in parts)])),
        np.concatenate([*(s.source for s in first), *(source for _, source, _ in parts)]),
        np.concatenate([*(s.leaf for s in first), *(c.leaf for _, _, c in parts)]),
        np.concatenate([*(s.segment for s in first), *segment]),
        np.concatenate([*(s.commitments for s in first), *(c.commitments for _, _, c in parts)]),
    )
