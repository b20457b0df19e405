"""The ways of sealing and opening that are compared, each as work for the harness.

All are given the same rows (`salt | canonical record`), in one thread:

- `aes-gcm`: `cryptography`'s AESGCM alone, messages and nonces at hand, no associated data, results dropped.
- `aes-gcm+sha256`: the same and one SHA-256 of each message: the least that a format costs which commits to its
  records with SHA-256.
- `frames`: the cryptography of our shards alone (`seal_frames`, `open_frames`): nonces from leaf indices, the
  header's digest authenticated with each frame, salt and record joined or split. Results dropped.
- `shard`: a whole shard in memory. Sealing: duplicates refused, commitments, Merkle root, signed header, frames.
  Reading: header verified, frames opened, commitments and root recomputed.
- `parquet-N`: a whole encrypted Parquet file in memory, N rows a row group. No commitments.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from caltrain.bench.formats import EncryptedParquet, Pick, Row, SealedShards
from caltrain.bench.harness import Work
from caltrain.crypto.aead import KEY_BYTES
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES
from caltrain.records.schema import DataSchema, encode_record

BASELINE = "aes-gcm"
GROUPS = (16, 128, 1024)
BATCH = 128
BATCHES = 8
_NAME = "file"
_STEP = "bench"


def schema_of(record_bytes: int) -> DataSchema:
    """A schema whose records have that many bytes of pixels (1 to 4096)."""
    return DataSchema(shape=(1, 1, record_bytes), classes=("a", "b"))


def random_rows(record_bytes: int, rows: int, *, seed: int) -> list[Row]:
    """(salt, canonical record) with random pixels: they do not compress, and they repeat for the same seed."""
    draw = np.random.default_rng(seed)
    schema, salts = schema_of(record_bytes), draw.bytes(rows * SALT_BYTES)
    pixels = draw.integers(0, 256, (rows, *schema.shape), dtype=np.uint8)
    records = [encode_record(schema, image, label % 2) for label, image in enumerate(pixels)]
    return [(salts[i * SALT_BYTES : (i + 1) * SALT_BYTES], record) for i, record in enumerate(records)]


class Ways:
    """Rows of one size, sealed in every way."""

    def __init__(self, record_bytes: int, rows: int) -> None:
        self.rows = random_rows(record_bytes, rows, seed=0)
        self.message_bytes = len(self.rows[0][0]) + len(self.rows[0][1])
        self._cipher = AESGCM(os.urandom(KEY_BYTES))
        self._messages = [(i.to_bytes(12, "big"), salt + record, None) for i, (salt, record) in enumerate(self.rows)]
        self._sealed = [(message[0], self._cipher.encrypt(*message), None) for message in self._messages]
        self._shards = SealedShards(schema_of(record_bytes))
        self._shard, self._header = self._shards.write(self.rows)
        self._parquet = {f"parquet-{group}": EncryptedParquet(group=group) for group in GROUPS}
        self._files = {way: parquet.write(self.rows, name=_NAME) for way, parquet in self._parquet.items()}

    def seal(self) -> dict[str, Work]:
        """Seal all rows."""
        frames = lambda: shards.seal_frames(self._header, self._shards.data_key, self.rows)
