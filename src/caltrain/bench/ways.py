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
from functools import partial
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
BATCHES = 32
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
        self._messages = [(i.to_bytes(12, "big"), salt + record) for i, (salt, record) in enumerate(self.rows)]
        self._sealed = [(nonce, self._cipher.encrypt(nonce, message, None)) for nonce, message in self._messages]
        self._shards = SealedShards(schema_of(record_bytes))
        self._shard, self._header = self._shards.write(self.rows)
        self._parquet = {f"parquet-{group}": EncryptedParquet(group=group) for group in GROUPS}
        self._files = {way: parquet.write(self.rows, name=_NAME) for way, parquet in self._parquet.items()}

    def seal(self) -> dict[str, Work]:
        """Seal all rows."""
        return {
            BASELINE: partial(_use, self._cipher.encrypt, self._messages),
            "aes-gcm+sha256": partial(_hash_and_encrypt, self._cipher, self._messages),
            "frames": lambda: _drop(shards.seal_frames(self._header, self._shards.data_key, self.rows)),
            "shard": partial(self._shards.write, self.rows),
            **{way: partial(parquet.write, self.rows, name=_NAME) for way, parquet in self._parquet.items()},
        }

    def read(self) -> dict[str, Work]:
        """Read all rows in order."""
        body = io.BytesIO(self._shard)
        shards.read_header(body, step=_STEP)
        chunks = list(shards.read_chunks(body))
        key, schema = self._shards.data_key, self._shards.schema
        return {
            BASELINE: partial(_use, self._cipher.decrypt, self._sealed),
            "aes-gcm+sha256": partial(_decrypt_and_hash, self._cipher, self._sealed),
            "frames": lambda: _drop(shards.open_frames(self._header, key, chunks, schema=schema, step=_STEP)),
            "shard": lambda: _drop(self._shards.read(self._shard, self._header)),
            **{way: partial(_read_parquet, parquet, self._files[way]) for way, parquet in self._parquet.items()},
        }

    @contextmanager
    def shuffled(self) -> Iterator[tuple[dict[str, Work], int]]:
        """Read batches in random order out of mapped files; also the number of rows that are read."""
        order = np.random.default_rng(1).permutation(len(self.rows))[: BATCH * BATCHES].tolist()
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            _store(folder, {"frames": self._shard, **self._files})
            pickers = {"frames": self._shards.picker(folder / "frames", self._header)}
            pickers |= {way: parquet.picker(folder / way, name=_NAME) for way, parquet in self._parquet.items()}
            # Out of one buffer, as the others: thousands of separate objects in random order are slower to fetch.
            buffer = b"".join(sealed for _, sealed in self._sealed)
            work: dict[str, Work] = {BASELINE: partial(_decrypt_slices, self._cipher, buffer, self._places(order))}
            for way, picker in pickers.items():
                work[way] = partial(_pick_all, stack.enter_context(picker), batches)
            yield work, len(order)

    def _places(self, order: Sequence[int]) -> list[tuple[bytes, slice]]:
        size = len(self._sealed[0][1])
        return [(self._sealed[i][0], slice(i * size, (i + 1) * size)) for i in order]


def _use(crypt: Callable[[bytes, bytes, None], bytes], messages: Sequence[tuple[bytes, bytes]]) -> None:
    for nonce, message in messages:
        crypt(nonce, message, None)


def _hash_and_encrypt(cipher: AESGCM, messages: Sequence[tuple[bytes, bytes]]) -> None:
    for nonce, message in messages:
        hashlib.sha256(message).digest()
        cipher.encrypt(nonce, message, None)


def _decrypt_and_hash(cipher: AESGCM, sealed: Sequence[tuple[bytes, bytes]]) -> None:
    for nonce, message in sealed:
        hashlib.sha256(cipher.decrypt(nonce, message, None)).digest()


def _decrypt_slices(cipher: AESGCM, buffer: bytes, places: Sequence[tuple[bytes, slice]]) -> None:
    for nonce, place in places:
        cipher.decrypt(nonce, buffer[place], None)


def _read_parquet(parquet: EncryptedParquet, raw: bytes) -> None:
    _drop(parquet.read(raw, name=_NAME))


def _pick_all(pick: Pick, batches: Sequence[Sequence[int]]) -> None:
    for batch in batches:
        pick(batch)


def _drop(items: Iterable[object]) -> None:
    deque(items, maxlen=0)


def _store(folder: Path, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
