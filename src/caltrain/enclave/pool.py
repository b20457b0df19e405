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

import numpy as np
from numpy.typing import NDArray

from caltrain.crypto.aead import TAG_BYTES, FrameCipher
from caltrain.crypto.kdf import derive
from caltrain.enclave.door import Door
from caltrain.errors import IntegrityError

_BLOCK_BYTES = 1 << 20
_PART_BYTES = 32 << 20
Rows = NDArray[np.uint8]


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


class Pool:
    """Rows of fixed size in the host's storage. `generation` counts the shuffles."""

    def __init__(self, door: Door, *, shape: PoolShape) -> None:
        self.shape = shape
        self.generation = 0
        self._door = door
        self._secret = os.urandom(32)
        self._buffer: list[bytes] = []
        self._written = 0

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
        self._write_block(self._cipher("pool", 0), "pool-0", self._written, b"".join(self._buffer))
        self._written += 1
        self._buffer.clear()

    # -- reading -------------------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop` (start at a block's beginning) of the present generation: (n, row_bytes)."""
        cipher, name = self._cipher("pool", self.generation), _name(self.generation)
        blocks = [self._read_block(cipher, name, i) for i in range(start // self.shape.block, self._blocks(stop))]
        return np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, self.shape.row_bytes)[: stop - start]

    def batches(self, size: int) -> Iterator[Rows]:
        """Full batches of `size` rows in order; a rest that fills none is left out."""
        pending = np.empty((0, self.shape.row_bytes), np.uint8)
        for start in range(0, self.shape.records, self.shape.block):
            more = self.rows(start, min(start + self.shape.block, self.shape.records))
            pending = np.concatenate((pending, more))
            whole = len(pending) - len(pending) % size
            yield from pending[:whole].reshape(-1, size, self.shape.row_bytes)
            pending = pending[whole:]

    # -- shuffling -----------------------------------------------------------------------------------------------

    def shuffle(self, order: NDArray[np.int64]) -> None:
        """Write the next generation: its row i is row `order[i]` of the present one."""
        if self.shape.parts == 1:
            self._write_part(0, self.rows(0, self.shape.records)[order])
        else:
            target = np.empty_like(order)
            target[order] = np.arange(len(order))
            cells = self._distribute(target)
            for bucket in range(self.shape.parts):
                self._write_part(bucket, self._collect(bucket, cells))
        self.generation += 1

    def _distribute(self, target: NDArray[np.int64]) -> int:
        """Pass 1: send every row, with its place, to the cell of its bucket. Returns the cells of a bucket."""
        shape = self.shape
        cipher = self._cipher("cells", self.generation)
        stash = [_no_rows(shape) for _ in range(shape.parts)]
        for turn in range(shape.parts + 1):
            start, stop = turn * shape.part, min((turn + 1) * shape.part, shape.records)
            if turn < shape.parts:
                placed = _with_place(self.rows(start, stop), target[start:stop])
                bucket_of = target[start:stop] // shape.part
            for bucket in range(shape.parts):
                queue = stash[bucket]
                if turn < shape.parts:
                    queue = np.concatenate((queue, placed[bucket_of == bucket]))
                cell, stash[bucket] = queue[: shape.cell], queue[shape.cell :]
                self._write_cell(cipher, turn * shape.parts + bucket, cell)
        if any(len(rows) for rows in stash):
            raise IntegrityError(
                "pool.overflow",
                "a shuffle did not fit its fixed cells (expected less than once in a million epochs)",
                step="shuffle pool",
                fix="Start the run again: it draws another order.",
            )
        return shape.parts + 1

    def _collect(self, bucket: int, cells: int) -> Rows:
        """Pass 2: the rows of one bucket in their order."""
        cipher, shape = self._cipher("cells", self.generation), self.shape
        size = shape.cell * (8 + shape.row_bytes)
        found: list[Rows] = []
        for turn in range(cells):
            index = turn * shape.parts + bucket
            sealed = self._door.read("pool-cells", offset=index * (size + TAG_BYTES), length=size + TAG_BYTES)
            plain = cipher.unseal(index, sealed, step="shuffle pool")
            rows = np.frombuffer(plain, np.uint8).reshape(shape.cell, -1)
            found.append(rows[_places(rows) >= 0])
        placed = np.concatenate(found)
        return placed[np.argsort(_places(placed))][:, 8:]

    def _write_cell(self, cipher: FrameCipher, index: int, rows: Rows) -> None:
        cell = np.zeros((self.shape.cell, 8 + self.shape.row_bytes), np.uint8)
        cell[:, :8] = 255  # place -1: padding
        cell[: len(rows)] = rows
        sealed = cipher.seal(index, cell.tobytes())
        self._door.write("pool-cells", sealed, offset=index * len(sealed))

    def _write_part(self, part: int, rows: Rows) -> None:
        cipher, name = self._cipher("pool", self.generation + 1), _name(self.generation + 1)
        first = part * self.shape.part // self.shape.block
        for i in range(0, len(rows), self.shape.block):
            block = rows[i : i + self.shape.block].tobytes()
            self._write_block(cipher, name, first + i // self.shape.block, block)

    # -- blocks --------------------------------------------------------------------------------------------------

    def _cipher(self, what: str, generation: int) -> FrameCipher:
        """A key for each generation: frame numbers are its nonces, and an old generation does not open in a new."""
        key = derive(self._secret, f"{what}/v1", generation.to_bytes(8, "big"))
        return FrameCipher(key, context=what.encode())

    def _blocks(self, rows: int) -> int:
        return math.ceil(rows / self.shape.block)

    def _write_block(self, cipher: FrameCipher, name: str, index: int, rows: bytes) -> None:
        self._door.write(name, cipher.seal(index, rows), offset=index * (self._block_bytes + TAG_BYTES))

    def _read_block(self, cipher: FrameCipher, name: str, index: int) -> bytes:
        rows = min(self.shape.block, self.shape.records - index * self.shape.block)
        sealed = self._door.read(
            name, offset=index * (self._block_bytes + TAG_BYTES), length=rows * self.shape.row_bytes + TAG_BYTES
        )
        return cipher.unseal(index, sealed, step="read pool")

    @property
    def _block_bytes(self) -> int:
        return self.shape.block * self.shape.row_bytes


def _name(generation: int) -> str:
    # Two objects in turn: the one being read, the one being written.
    return f"pool-{generation % 2}"


def _no_rows(shape: PoolShape) -> Rows:
    return np.empty((0, 8 + shape.row_bytes), np.uint8)


def _with_place(rows: Rows, place: NDArray[np.int64]) -> Rows:
    prefix = np.ascontiguousarray(place, dtype="<i8").view(np.uint8).reshape(-1, 8)
    return np.concatenate((prefix, rows), axis=1)


def _places(rows: Rows) -> NDArray[np.int64]:
    return np.ascontiguousarray(rows[:, :8]).view("<i8").reshape(-1).astype(np.int64)
