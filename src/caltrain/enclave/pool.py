"""The permuted pool: all records under a key of the enclave's own, written afresh in another order each epoch.

The host stores the pool and sees every access. What it sees must not tell whose record is in which batch, so the
shuffle's accesses depend on sizes alone: pass 1 reads the pool in order and writes, for every part of it, a cell of
fixed size to every bucket (padded, with what does not fit carried on to the next part); pass 2 reads a bucket's cells
and writes its records in order. The permutation itself is uniform and drawn from the run seed; see
`training.seeds.epoch_order`. (After the Melbourne shuffle, Ohrimenko et al. 2014, and Prochlo's stash shuffle.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.crypto.aead import TAG_BYTES, FrameCipher
from caltrain.crypto.kdf import derive
from caltrain.enclave.door import Door
from caltrain.errors import IntegrityError

_BLOCK_BYTES = 1 << 20
_PART_BYTES = 8 << 20
Rows = NDArray[np.uint8]
Order = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PoolShape:
    """Sizes that decide the access pattern: records, bytes of one, records of a block, of a part (= of a bucket)."""

    records: int
    row_bytes: int
    block: int
    part: int

    @classmethod
    def fit(cls, records: int, row_bytes: int, *, part_bytes: int = _PART_BYTES) -> PoolShape:
        """Blocks of about 1 MiB, parts of about `part_bytes` (whole blocks).

        A part holds at least 4 times the root of the records, however large they are: with fewer rows a part than
        there are parts, the padding of the cells would outgrow the pool.
        """
        block = max(1, _BLOCK_BYTES // row_bytes)
        block = min(block, max(1, part_bytes // row_bytes))
        rows = max(part_bytes // row_bytes, 4 * math.isqrt(records))
        return cls(records, row_bytes, block, max(1, rows // block) * block)

    @property
    def parts(self) -> int:
        """Number of parts, and of buckets."""
        return math.ceil(self.records / self.part)

    @property
    def cell(self) -> int:
        """Rows of a cell: the mean that a part sends to a bucket, and six standard deviations."""
        mean = self.part / self.parts
        return min(self.part, math.ceil(mean + 6 * math.sqrt(mean) + 8))


class PoolPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it takes to open the present generation again."""

    generation: int
    key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Pool:
    """Rows of fixed size in the host's storage, as objects called `name-...`. `generation` counts the shuffles.

    Each generation has a key drawn anew, so a shuffle that is repeated after a restart never repeats a nonce.
    """

    def __init__(self, door: Door, *, shape: PoolShape, name: str = "pool", place: PoolPlace | None = None) -> None:
        self.shape = shape
        self.place = place or PoolPlace(0, os.urandom(32))
        self._door = door
        self._name = name
        self._buffer: list[bytes] = []
        self._written = 0

    @property
    def generation(self) -> int:
        """How often the pool was shuffled."""
        return self.place.generation

    # -- filling -------------------------------------------------------------------------------------------------

    def append(self, row: bytes) -> None:
        """Add a record at ingest."""
        self._buffer.append(row)
        if len(self._buffer) == self.shape.block:
            self._flush()

    def finish(self) -> None:
        """Write the last block."""
        if self._buffer:
            self._flush()

    def _flush(self) -> None:
        self._write_block(self._cipher("pool", self.place), self.place, self._written, b"".join(self._buffer))
        self._written += 1
        self._buffer.clear()

    # -- reading -------------------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (start at a block's beginning) of the present generation: (n, row_bytes)."""
        cipher = self._cipher("pool", self.place)
        found = np.empty((stop - start, self.shape.row_bytes), np.uint8)
        for i in range(start // self.shape.block, self._blocks(stop)):
            block = np.frombuffer(self._read_block(cipher, i), np.uint8).reshape(-1, self.shape.row_bytes)
            at = i * self.shape.block - start
            found[at : at + len(block)] = block[: stop - start - at]
        return found

    def batches(self, size: int, *, first: int = 0, whole: bool = True) -> Iterator[Rows]:
        """Batches of `size` rows in order, from batch `first` on; a rest that fills none only unless `whole`."""
        begin = first * size
        pending, skip = _empty(self.shape.row_bytes), begin % self.shape.block
        for start in range(begin - skip, self.shape.records, self.shape.block):
            more = self.rows(start, min(start + self.shape.block, self.shape.records))[skip:]
            pending, skip = np.concatenate((pending, more)), 0
            full = len(pending) - len(pending) % size
            yield from pending[:full].reshape(-1, size, self.shape.row_bytes)
            pending = pending[full:]
        if len(pending) and not whole:
            yield pending

    # -- shuffling -----------------------------------------------------------------------------------------------

    def shuffle(self, order: Order) -> None:
        """Write the next generation: its row i is row `order[i]` of the present one.

        Beside `order` and its inverse memory does not grow with the records: one part is held, and what waits for the
        next cells.
        """
        coming = PoolPlace(self.generation + 1, os.urandom(32))
        if self.shape.parts == 1:
            self._write_part(coming, 0, self.rows(0, self.shape.records)[order])
        else:
            target = np.empty_like(order)
            target[order] = np.arange(len(order), dtype=order.dtype)
            cells = self._distribute(target, coming)
            for bucket in range(self.shape.parts):
                self._write_part(coming, bucket, self._collect(bucket, cells, coming))
        self.place = coming

    def _distribute(self, target: Order, coming: PoolPlace) -> int:
        """Pass 1: send every row, with its place, to the cell of its bucket. Returns the cells of a bucket."""
        shape = self.shape
        cipher = self._cipher("cells", coming)
        stash = [_empty(8 + shape.row_bytes) for _ in range(shape.parts)]
        for turn in range(shape.parts + 1):
            for bucket, queue in enumerate(self._queues(turn, target, stash)):
                self._write_cell(cipher, turn * shape.parts + bucket, queue[: shape.cell])
                stash[bucket] = queue[shape.cell :].copy()  # a view would keep the whole queue
        if any(len(rows) for rows in stash):
            raise IntegrityError(
                "pool.overflow",
                "a shuffle did not fit its fixed cells (expected less than once in a million epochs)",
                step="shuffle pool",
                fix="Start the run again: it draws another order.",
            )
        return shape.parts + 1

    def _queues(self, turn: int, target: Order, stash: list[Rows]) -> Iterator[Rows]:
        """For each bucket what waits for it, and its rows of part `turn`; after the last part there are none."""
        shape, start = self.shape, turn * self.shape.part
        places = target[start : start + shape.part]
        rows = self.rows(start, start + len(places)) if len(places) else _empty(shape.row_bytes)
        bucket_of = places // shape.part
        for bucket, waiting in enumerate(stash):
            here = bucket_of == bucket
            yield np.concatenate((waiting, _with_place(rows[here], places[here])))

    def _collect(self, bucket: int, cells: int, coming: PoolPlace) -> Rows:
        """Pass 2: the rows of one bucket in their order."""
        cipher, shape = self._cipher("cells", coming), self.shape
        size, start = shape.cell * (8 + shape.row_bytes), bucket * shape.part
        found = np.empty((min(shape.part, shape.records - start), shape.row_bytes), np.uint8)
        for turn in range(cells):
            index = turn * shape.parts + bucket
            sealed = self._door.read(f"{self._name}-cells", offset=index * (size + TAG_BYTES), length=size + TAG_BYTES)
            plain = cipher.unseal(index, sealed, step="shuffle pool")
            rows = np.frombuffer(plain, np.uint8).reshape(shape.cell, -1)
            places = _places(rows)
            found[places[places >= 0] - start] = rows[places >= 0, 8:]
        return found

    def _write_cell(self, cipher: FrameCipher, index: int, rows: Rows) -> None:
        cell = np.zeros((self.shape.cell, 8 + self.shape.row_bytes), np.uint8)
        cell[:, :8] = 255  # place -1: padding
        cell[: len(rows)] = rows
        sealed = cipher.seal(index, cell.tobytes())
        self._door.write(f"{self._name}-cells", sealed, offset=index * len(sealed))

    def _write_part(self, coming: PoolPlace, part: int, rows: Rows) -> None:
        cipher = self._cipher("pool", coming)
        first = part * self.shape.part // self.shape.block
        for i in range(0, len(rows), self.shape.block):
            block = rows[i : i + self.shape.block].tobytes()
            self._write_block(cipher, coming, first + i // self.shape.block, block)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _cipher(self, what: str, place: PoolPlace) -> FrameCipher:
        """A key for each generation: frame numbers are its nonces, and an old generation does not open in a new."""
        key = derive(place.key, f"{what}/v1", place.generation.to_bytes(8, "big"))
        return FrameCipher(key, context=what.encode())

    def _blocks(self, rows: int) -> int:
        return math.ceil(rows / self.shape.block)

    def _object(self, place: PoolPlace) -> str:
        # Two objects in turn: the one being read, the one being written.
        return f"{self._name}-{place.generation % 2}"

    def _write_block(self, cipher: FrameCipher, place: PoolPlace, index: int, rows: bytes) -> None:
        offset = index * (self._block_bytes + TAG_BYTES)
        self._door.write(self._object(place), cipher.seal(index, rows), offset=offset)

    def _read_block(self, cipher: FrameCipher, index: int) -> bytes:
        rows = min(self.shape.block, self.shape.records - index * self.shape.block)
        offset, length = index * (self._block_bytes + TAG_BYTES), rows * self.shape.row_bytes + TAG_BYTES
        sealed = self._door.read(self._object(self.place), offset=offset, length=length)
        return cipher.unseal(index, sealed, step="read pool")

    @property
    def _block_bytes(self) -> int:
        return self.shape.block * self.shape.row_bytes


def smallest(order: Order) -> Order:
    """The same numbers in as few bytes as they take: 4 for each up to 4 thousand million records."""
    return order.astype(np.min_scalar_type(len(order)))


def _empty(width: int) -> Rows:
    return np.empty((0, width), np.uint8)


def _with_place(rows: Rows, place: Order) -> Rows:
    prefix = np.ascontiguousarray(place, dtype="<i8").view(np.uint8).reshape(-1, 8)
    return np.concatenate((prefix, rows), axis=1)


def _places(rows: Rows) -> NDArray[np.int64]:
    return np.ascontiguousarray(rows[:, :8]).view("<i8").reshape(-1).astype(np.int64)
