"""Sealed shards beside raw AES-GCM and encrypted Parquet: speed, each with its spread, and what tampering is noticed.

    caltrain bench sealing --format json

Ways, all on the same rows (`salt | canonical record`) and in one thread:

- `aes-gcm`: `cryptography`'s AESGCM alone, messages and nonces at hand, nothing authenticated besides, results
  dropped. The baseline.
- `aes-gcm+sha256`: the same and one SHA-256 of each message: about what any format must spend that commits to its
  records with SHA-256.
- `frames`: the cryptography of our shards alone (`seal_frames`, `open_frames`): nonces from leaf indices, the
  header's digest authenticated with each frame, salt and record joined or split. Results dropped.
- `shard`: a whole shard in memory. Sealing: duplicates refused, commitments, Merkle root, signed header, frames.
  Reading: header verified, frames opened, commitments and root recomputed.
- `parquet-N`: a whole encrypted Parquet file in memory, N rows a row group. No commitments.

Tasks: `seal` and `read` all rows in order; `shuffled` reads batches of 128 rows in random order out of a memory map
(`frames`: no commitments recomputed).
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from caltrain.bench.formats import EncryptedParquet, Pick, Row, SealedShards
from caltrain.bench.harness import Clock, Spread, Work, compare
from caltrain.bench.tampering import Tampering, parquet_specimen, shard_specimen, tamper
from caltrain.errors import ConfigError
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES
from caltrain.records.schema import DataSchema, encode_record

GROUPS = (16, 128, 1024)
BATCH = 128
BATCHES = 8
_TAMPERED_ROWS, _TAMPERED_GROUP = 128, 16
_BASELINE = "aes-gcm"
_NAME = "file"

Task = Literal["seal", "read", "shuffled"]


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """One way of one task: rows a second, and speed as a multiple of `aes-gcm` in the same round."""

    task: Task
    way: str
    record_bytes: int
    message_bytes: int
    rows: int
    rows_per_second: Spread
    speed: Spread


class SealingReport(msgspec.Struct, frozen=True, kw_only=True):
    """`measures` by size, task and way; `tampering` by format and attack. Times are processor seconds."""

    records: int
    repeats: int
    versions: dict[str, str]
    measures: tuple[Measure, ...]
    tampering: tuple[Tampering, ...]


def run(
    *,
    records: int = 20_000,
    record_bytes: Sequence[int] = (784, 3072),
    repeats: int = 5,
    positions: int = 1000,
    clock: Clock = time.process_time,
) -> SealingReport:
    """Measure `records` random records of each size (bytes of pixels: MNIST 784, CIFAR 3072).

    Raises ConfigError `bench.bounds`, `bench.no-parquet`, and what `harness.compare` raises.
    """
    _check(records=records, record_bytes=record_bytes, positions=positions)
    measures: list[Measure] = []
    for size in record_bytes:
        measures += _Sized(size, records).measure(repeats, clock)
    return SealingReport(
        records=records,
        repeats=repeats,
        versions={
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{package: version(package) for package in ("cryptography", "pyarrow", "caltrain")},
        },
        measures=tuple(measures),
        tampering=_tampering(record_bytes[0], positions),
    )


def _check(*, records: int, record_bytes: Sequence[int], positions: int) -> None:
    bounds = [("records", records, 100, 1_000_000), ("positions", positions, 2, 1_000_000)]
    bounds += [("record_bytes", size, 16, 4096) for size in record_bytes]
    bounds += [("sizes", len(record_bytes), 1, 16)]
    for name, value, low, high in bounds:
        if not low <= value <= high:
            raise ConfigError(
                "bench.bounds", f"{name} is {value}", step="bench sealing", fix=f"Give {low} to {high} of {name}."
            )


class _Sized:
    """Everything of one record size: rows, both formats, and their files in memory."""

    def __init__(self, size: int, records: int) -> None:
        self.size = size
        self.shards = SealedShards(_schema(size))
        self.rows = _rows(size, records, seed=0)
        self.messages = [salt + record for salt, record in self.rows]
        self.nonces = [i.to_bytes(12, "big") for i in range(records)]
        self.cipher = AESGCM(os.urandom(32))
        self.sealed = [self.cipher.encrypt(n, m, None) for n, m in zip(self.nonces, self.messages, strict=True)]
        self.shard, self.header = self.shards.write(self.rows)
        self.parquet = {f"parquet-{group}": EncryptedParquet(group=group) for group in GROUPS}
        self.files = {way: parquet.write(self.rows, name=_NAME) for way, parquet in self.parquet.items()}

    def measure(self, repeats: int, clock: Clock) -> list[Measure]:
        """Every task, one after the other."""
        measures = self._compared("seal", self._seal(), len(self.rows), repeats, clock)
        measures += self._compared("read", self._read(), len(self.rows), repeats, clock)
        order = np.random.default_rng(1).permutation(len(self.rows))[: BATCH * BATCHES]
        with ExitStack() as stack:
            work = self._shuffled([order[i : i + BATCH].tolist() for i in range(0, len(order), BATCH)], stack)
            return measures + self._compared("shuffled", work, len(order), repeats, clock)

    def _compared(self, task: Task, work: dict[str, Work], rows: int, repeats: int, clock: Clock) -> list[Measure]:
        return [
            Measure(
                task=task,
                way=timing.name,
                record_bytes=self.size,
                message_bytes=len(self.messages[0]),
                rows=rows,
                rows_per_second=Spread.of([rows / seconds for seconds in timing.rounds]),
                speed=timing.speed,
            )
            for timing in compare(work, baseline=_BASELINE, repeats=repeats, clock=clock)
        ]

    def _seal(self) -> dict[str, Work]:
        def raw() -> None:
            for nonce, message in zip(self.nonces, self.messages, strict=True):
                self.cipher.encrypt(nonce, message, None)

        def hashed() -> None:
            for nonce, message in zip(self.nonces, self.messages, strict=True):
                hashlib.sha256(message).digest()
                self.cipher.encrypt(nonce, message, None)

        return {
            _BASELINE: raw,
            "aes-gcm+sha256": hashed,
            "frames": lambda: _drop(shards.seal_frames(self.header, self.shards.data_key, self.rows)),
            "shard": lambda: self.shards.write(self.rows),
        } | {way: _bound(parquet.write, self.rows, name=_NAME) for way, parquet in self.parquet.items()}

    def _read(self) -> dict[str, Work]:
        stream = io.BytesIO(self.shard)
        shards.read_header(stream, step="bench")
        chunks = list(shards.read_chunks(stream))

        def raw() -> None:
            for nonce, sealed in zip(self.nonces, self.sealed, strict=True):
                self.cipher.decrypt(nonce, sealed, None)

        def hashed() -> None:
            for nonce, sealed in zip(self.nonces, self.sealed, strict=True):
                hashlib.sha256(self.cipher.decrypt(nonce, sealed, None)).digest()

        def frames() -> None:
            _drop(shards.open_frames(self.header, self.shards.data_key, chunks, schema=self.shards.schema, step="x"))

        return {
            _BASELINE: raw,
            "aes-gcm+sha256": hashed,
            "frames": frames,
            "shard": lambda: _drop(self.shards.read(self.shard, self.header)),
        } | {way: _drained(self.parquet[way], raw) for way, raw in self.files.items()}
