"""The linkage store: (F, Y, S, H) of every record of any number of models, kept by the host, searched in here.

Classes are unsealed when they are needed. Rows lie by class, so the host can tell which part is asked for first and
how large it is: `load` whole models where that must not show; then every block is read once, in order. Removed records
stay with the host, sealed, until `rebuild`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from caltrain.accountability.search import nearest
from caltrain.accountability.segments import MAX_REMOVED, MAX_TIME, Batch, Source, joined
from caltrain.enclave.door import Door
from caltrain.enclave.segments import STEP, Place, SealedSegments
from caltrain.enclave.shelves import Filling, Removed, Shelf, Sources, keys, with_last
from caltrain.errors import DataError
from caltrain.records.commitment import RecordRef


@dataclass(frozen=True)
class Where:
    """Which records count: of these contributors (None: all), linked at a time from `since` up to `until`, included."""

    contributors: frozenset[str] | None = None
    since: int = 0
    until: int = MAX_TIME


EVERYWHERE = Where()


@dataclass(frozen=True)
class Table:
    """All records of a model, class by class: fingerprints (N, D) float32, labels (N,), commitments (N, 32).

    Row i is the record `leaf[i]` of the shard `shards[source[i]]`.
    """

    fingerprints: Tensor
    labels: Tensor
    shards: tuple[Source, ...]
    source: NDArray[np.uint32]
    leaf: NDArray[np.uint32]
    commitments: NDArray[np.uint8]

    def record(self, row: int) -> RecordRef:
        """Where the record of a row is."""
        return RecordRef(*self.shards[int(self.source[row])], int(self.leaf[row]))


@dataclass(frozen=True)
class Hit:
    """A record that was found, and how far it is."""

    record: RecordRef
    label: int
    distance: float
    commitment: bytes
    time: int


class LinkageStore:
    """One run's links. One thread adds and removes; others may search meanwhile, in what there was."""

    def __init__(self, door: Door, segments: SealedSegments) -> None:
        self._door, self._segments = door, segments
        self._sources = Sources()
        self._shelves: dict[tuple[str, int], tuple[Shelf, ...]] = {}
        self._turn = threading.RLock()
        for header in segments.headers:
            self._sources.add(header.sources)

    @classmethod
    def create(cls, door: Door, place: Place) -> LinkageStore:
        """An empty store. What the host has under its names is written over."""
        return cls(door, SealedSegments(door, place))

    @classmethod
    def open(cls, door: Door, place: Place, *, head: str) -> LinkageStore:
        """The store whose chain leads through `head`, all classes cold. Raises what `SealedSegments.open` does."""
        return cls(door, SealedSegments.open(door, place, head=head))

    @property
    def head(self) -> str:
        """The head of its chain: who keeps it notices a store that is older."""
        return self._segments.head

    @property
    def place(self) -> Place:
        """What it takes to open it again."""
        return self._segments.place

    # -- adding and removing -----------------------------------------------------------------------------------------

    def append(self, batch: Batch, *, model: str, time: int) -> str:
        """Add records of a model; returns the new head once the host says that all of it is durable.

        Classes of the model that are in memory have them from then on. Raises DataError `segment.uneven`,
        `linkage.other-size`, and what the door raises; then nothing was added.
        """
        dims = batch.fingerprints.shape[1]
        with self._turn:
            due = next((h.dims for h in self._segments.headers if h.model == model and h.dims), dims)
            if dims != due:
                raise _refuse("linkage.other-size", f"fingerprints of {dims} numbers, the model's have {due}")
            self._segments.append(batch, model=model, time=time)
            header = self._segments.headers[-1]
            self._sources.add(header.sources)
            for label, size in header.classes:
                if (model, label) in self._shelves:
                    columns = batch.of_label(label)
                    filling = Filling(size, dims)
                    filling.add(header.number, self._sources.numbers(batch.sources, columns.source), columns)
                    self._shelves[model, label] = with_last(self._shelves[model, label], filling.shelf())
            return self.head

    def remove(self, records: Sequence[RecordRef], *, model: str, time: int) -> str:
        """Records that count no longer; returns the new head. Reads all classes of the model.

        Raises DataError `linkage.unknown-record` where one of them is not linked, or there are none.
        """
        with self._turn:
            self.load(model)
            named = self._sources.keys(records)
            known = [keys(s.source, s.leaf) for label in self.labels(model) for s in self._shelves[model, label]]
            here = np.isin(named, np.concatenate(known))
            if not records or not here.all():
                raise _refuse(
                    "linkage.unknown-record", f"no record {[*records][int(here.argmin())] if records else ''}"
                )
            for start in range(0, len(records), MAX_REMOVED):
                some = tuple(records[start : start + MAX_REMOVED])
                self._segments.append_removal(some, model=model, time=time)
            removed = self._removed(model)
            for label in self.labels(model):
                self._shelves[model, label] = tuple(shelf.live(removed) for shelf in self._shelves[model, label])
            return self.head

    def rebuild(self) -> LinkageStore:
        """All that counts, written anew under another key: what was removed opens nowhere again.

        This store stays as it is; forget its key once the new one's place and head are kept.
        """
        place = Place.fresh(self.place.run)
        fresh = LinkageStore.create(self._door, Place(place.run, place.key, self.place.generation + 1))
        for header in [header for header in self._segments.headers if header.records]:
            removed, kept, labels = self._removed(header.model), [], []
            for label, columns in self._segments.columns(header.number, self.labels(header.model)):
                source = self._sources.numbers(header.sources, columns.source)
                gone = removed.hits(keys(source, columns.leaf), np.full(len(source), header.number, np.uint32))
                kept.append(columns.select(~gone))
                labels.append(np.full(len(kept[-1].leaf), label, np.int64))
            rows = joined(kept)
            if len(rows.leaf):
                batch = Batch(
                    rows.fingerprints, np.concatenate(labels), header.sources, rows.source, rows.leaf, rows.commitments
                )
                fresh.append(batch, model=header.model, time=header.time)
        return fresh

    # -- looking up --------------------------------------------------------------------------------------------------

    def labels(self, model: str) -> tuple[int, ...]:
        """Classes of which the model was linked to records. Raises DataError `linkage.unknown-model`."""
        found = {label for header in self._segments.headers if header.model == model for label, _ in header.classes}
        if not found:
            raise _refuse("linkage.unknown-model", f"no records are linked to the model {model}")
        return tuple(sorted(found))

    def load(self, model: str, labels: Sequence[int] | None = None) -> None:
        """Unseal these classes of a model (default: all), unless they are in memory.

        Raises LineageError `linkage.missing`, IntegrityError `segment.damaged`; what is in memory stays.
        """
        with self._turn:
            known = self.labels(model)
            wanted = known if labels is None else labels
            cold = [label for label in wanted if (model, label) not in self._shelves]
            numbers = [header.number for header in self._segments.headers if header.model == model and header.records]
            removed = self._removed(model)
            for label, shelf in self._filled(cold, numbers).items():
                self._shelves[model, label] = (shelf.live(removed),)

    def unload(self, model: str) -> None:
        """Forget what is in memory of a model."""
        with self._turn:
            for name in [name for name in self._shelves if name[0] == model]:
                del self._shelves[name]

    def count(self, model: str, label: int, *, where: Where = EVERYWHERE) -> int:
        """Records of a class that count."""
        return sum(_counted(shelf, self._keep(shelf, where)) for shelf in self.shelves(model, [label]))

    def nbytes(self, model: str) -> int:
        """Memory of the model's classes that are loaded."""
        return sum(shelf.nbytes for name, parts in self._shelves.items() if name[0] == model for shelf in parts)

    def nearest(
        self, queries: Tensor, *, model: str, labels: Sequence[int] | None, k: int, where: Where = EVERYWHERE
    ) -> list[list[Hit]]:
        """For each query (Q, D) the `k` nearest records of these classes (None: of any), nearest first.

        Raises DataError `linkage.unknown-model`, `linkage.unknown-contributor`, `linkage.empty-class` where no record
        counts, `linkage.too-few` where fewer than k do, and what `load` and `search.nearest` raise.
        """
        wanted = self.labels(model) if labels is None else tuple(labels)
        shelves = [(label, shelf) for label in wanted for shelf in self.shelves(model, [label])]
        keep = [self._keep(shelf, where) for _, shelf in shelves]
        there = sum(_counted(shelf, mask) for (_, shelf), mask in zip(shelves, keep, strict=True))
        if not there:
            raise _refuse("linkage.empty-class", f"no record of the classes {list(wanted)[:9]} counts")
        if k > there:
            raise _refuse("linkage.too-few", f"{k} neighbours were asked for, {there} records count")
        found = nearest(queries, [shelf.planes for _, shelf in shelves], k=k, keep=keep)
        return [self._hits(shelves, each.places.tolist(), each.distances.tolist()) for each in found]

    def entries(self, model: str, label: int) -> Iterator[tuple[RecordRef, bytes, Tensor]]:
        """Every record of a class: where it is, its commitment, its fingerprint as stored (D,) float16."""
        for shelf in self.shelves(model, [label]):
            for i, row in enumerate(shelf.planes.rows()):
                yield self._reference(shelf, i), shelf.commitments[i].tobytes(), row

    def find(self, model: str, commitment: bytes) -> RecordRef | None:
        """The record of this commitment (32 bytes), or None."""
        for shelf in self.shelves(model, self.labels(model)):
            rows = (shelf.commitments == np.frombuffer(commitment, np.uint8)).all(1).nonzero()[0]
            if len(rows):
                return self._reference(shelf, int(rows[0]))
        return None

    def table(self, model: str, *, limit: int) -> Table:
        """All records of a model that count. Raises DataError `linkage.too-large` beyond `limit` bytes, in advance."""
        shelves = [(label, shelf) for label in self.labels(model) for shelf in self.shelves(model, [label])]
        records = sum(len(shelf) for _, shelf in shelves)
        dims = shelves[0][1].planes.dims
        if 4 * records * dims > limit:
            raise _refuse("linkage.too-large", f"{records} fingerprints of {dims} numbers take more than {limit} bytes")
        fingerprints, filled = torch.empty((records, dims)), 0
        for _, shelf in shelves:
            fingerprints[filled : filled + len(shelf)] = shelf.planes.rows()
            filled += len(shelf)
        return Table(
            F.normalize(fingerprints, dim=1, out=fingerprints),  # what is stored is rounded
            torch.cat([torch.full((len(shelf),), label) for label, shelf in shelves]),
            tuple(self._sources.known),
            np.concatenate([shelf.source for _, shelf in shelves]),
            np.concatenate([shelf.leaf for _, shelf in shelves]),
            np.concatenate([shelf.commitments for _, shelf in shelves]),
        )

    def shelves(self, model: str, labels: Sequence[int]) -> list[Shelf]:
        """The rows of these classes at this moment: they stay as they are while others add."""
        with self._turn:
            self.load(model, labels)
            return [shelf for label in labels for shelf in self._shelves[model, label]]

    def _hits(self, shelves: Sequence[tuple[int, Shelf]], places: list[int], distances: list[float]) -> list[Hit]:
        ends, hits = np.cumsum([len(shelf) for _, shelf in shelves]), []
        for place, distance in zip(places, distances, strict=True):
            at = int(np.searchsorted(ends, place, side="right"))
            label, shelf = shelves[at]
            i = place - int(ends[at]) + len(shelf)
            time = self._segments.headers[int(shelf.segment[i])].time
            hits.append(Hit(self._reference(shelf, i), label, distance, shelf.commitments[i].tobytes(), time))
        return hits

    def _keep(self, shelf: Shelf, where: Where) -> Tensor | None:
        if where == EVERYWHERE:
            return None
        known = {party for party, _ in self._sources.known}
        parties = known if where.contributors is None else where.contributors
        if parties - known:
            raise _refuse("linkage.unknown-contributor", f"no record is of {min(parties - known)}")
        of_source = np.array([party in parties for party, _ in self._sources.known])
        in_time = np.array([where.since <= header.time <= where.until for header in self._segments.headers])
        return torch.from_numpy(of_source[shelf.source] & in_time[shelf.segment])

    def _reference(self, shelf: Shelf, i: int) -> RecordRef:
        return self._sources.reference(int(shelf.source[i]), int(shelf.leaf[i]))

    def _filled(self, labels: Sequence[int], numbers: Sequence[int]) -> dict[int, Shelf]:
        """Of each class a shelf with what these segments, all of one model, have of it."""
        headers = [self._segments.headers[number] for number in numbers]
        sizes = {label: sum(h.rows_of(label)[1] - h.rows_of(label)[0] for h in headers) for label in labels}
        filling = {label: Filling(size, headers[0].dims) for label, size in sizes.items()}
        for header in headers if labels else []:
            for label, columns in self._segments.columns(header.number, filling):
                filling[label].add(header.number, self._sources.numbers(header.sources, columns.source), columns)
        return {label: each.shelf() for label, each in filling.items()}

    def _removed(self, model: str) -> Removed:
        removals = [header for header in self._segments.headers if header.model == model and header.removed]
        return Removed.of((self._sources.keys(header.removed), header.number) for header in removals)


def _counted(shelf: Shelf, keep: Tensor | None) -> int:
    return len(shelf) if keep is None else int(keep.sum())


def _refuse(code: str, what: str) -> DataError:
    return DataError(code, what, step=STEP, fix="Ask for what is linked; nothing was changed.")
