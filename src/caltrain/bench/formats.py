"""The two ways to keep sealed records that are compared: our shards, and encrypted Parquet as it serves best.

Both hold the same rows, `salt | canonical record`, and both are read back to one `bytes` a record, which is what
recomputing a commitment needs.
"""

from __future__ import annotations

import base64
import importlib
import io
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from caltrain.crypto import dsse
from caltrain.crypto.aead import KEY_BYTES, seal, unseal
from caltrain.crypto.digests import same, to_text
from caltrain.crypto.merkle import MerkleBuilder
from caltrain.errors import ConfigError, IntegrityError
from caltrain.records import shard as shards
from caltrain.records.commitment import SALT_BYTES, RecordRef, commit
from caltrain.records.schema import DataSchema

Row = tuple[bytes, bytes]
Pick = Callable[[Sequence[int]], list[bytes]]
KeyUse = Literal["direct", "kms"]
_STEP = "open sealed file"
_PARTY = "party"
_COLUMN = "row"


class SealedShards:
    """Shards of one contributor, opened with all that the enclave checks of the file at ingest."""

    def __init__(self, schema: DataSchema) -> None:
        self.schema = schema
        self.data_key = os.urandom(KEY_BYTES)
        self._signer = dsse.SigningKey()

    def write(self, rows: Sequence[Row]) -> tuple[bytes, shards.ShardHeader]:
        """A new shard, and the header that stands for its name: the manifest lists id, root and count."""
        out = io.BytesIO()
        header = shards.write_shard(
            out,
            signer=self._signer,
            data_key=self.data_key,
            contributor=_PARTY,
            shard_id=os.urandom(16).hex(),
            schema=self.schema,
            records=[record for _, record in rows],
            salts=[salt for salt, _ in rows],
        )
        return out.getvalue(), header

    def read(self, raw: bytes, listed: shards.ShardHeader) -> Iterator[bytes]:
        """Records of the listed shard, commitments and root recomputed. Raises IntegrityError."""
        stream = io.BytesIO(raw)
        envelope, _ = shards.read_header(stream, step=_STEP)
        header = shards.open_header(envelope, contributor=_PARTY, public_key=self._signer.public, step=_STEP)
        if (header.shard, header.records) != (listed.shard, listed.records):
            raise _not_listed("its header names another shard")
        tree = MerkleBuilder()
        chunks = shards.read_chunks(stream)
        for leaf, salt, record in shards.open_frames(header, self.data_key, chunks, schema=self.schema, step=_STEP):
            tree.append(commit(RecordRef(_PARTY, header.shard, leaf), salt=salt, record=record))
            yield record
        if not same(to_text(tree.root()), listed.root):
            raise _not_listed("its records have another root")

    def units(self, raw: bytes, header: shards.ShardHeader) -> tuple[tuple[int, int], ...]:
        """(offset, length) of each frame."""
        _, first = shards.read_header(io.BytesIO(raw), step=_STEP)
        return tuple((first + leaf * header.frame_bytes, header.frame_bytes) for leaf in range(header.records))

    @contextmanager
    def picker(self, path: Path, header: shards.ShardHeader) -> Iterator[Pick]:
        """Records by leaf, out of a memory map."""
        cipher, size = shards.frame_cipher(header, self.data_key), header.frame_bytes
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            _, first = shards.read_header(file, step=_STEP)

            def pick(leaves: Sequence[int]) -> list[bytes]:
                starts = ((leaf, first + leaf * size) for leaf in leaves)
                return [cipher.unseal(leaf, mapped[at : at + size], step=_STEP)[SALT_BYTES:] for leaf, at in starts]

            yield pick


class EncryptedParquet:
    """One column of fixed-size binary in row groups of `group` rows, footer encrypted, one AES-256 key a file.

    One thread; no dictionary, statistics or compression, from which random pixels gain nothing. Keys `direct`
    give the file's name as AAD prefix, not stored in the file; keys `kms` go through the key management interface,
    which takes no AAD. (Parquet Modular Encryption, apache/parquet-format Encryption.md.)
    """

    def __init__(self, *, group: int, keys: KeyUse = "direct") -> None:
        self.group = group
        self._keys = keys
        self._key = os.urandom(KEY_BYTES)
        self._arrow, self._parquet, self._encryption = _libraries()

    def write(self, rows: Sequence[Row], *, name: str) -> bytes:
        """A Parquet file in memory."""
        messages = [salt + record for salt, record in rows]
        kind = self._arrow.binary(len(messages[0]))
        out = self._arrow.BufferOutputStream()
        self._parquet.write_table(
            self._arrow.table({_COLUMN: self._arrow.array(messages, kind)}),
            out,
            encryption_properties=self._encryption_properties(name),
            row_group_size=self.group,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        raw: bytes = out.getvalue().to_pybytes()
        return raw

    def read(self, raw: bytes, *, name: str) -> Iterator[bytes]:
        """Records in order. Raises whatever pyarrow raises for a file that it refuses."""
        with self._open(self._arrow.BufferReader(raw), name) as file:
            for batch in file.iter_batches(batch_size=1024, use_threads=False):
                for row in batch.column(0).to_pylist():
                    yield row[SALT_BYTES:]

    def units(self, raw: bytes, *, name: str) -> tuple[tuple[int, int], ...]:
        """(offset, length) of each row group's only column chunk."""
        with self._open(self._arrow.BufferReader(raw), name) as file:
            chunks = [file.metadata.row_group(i).column(0) for i in range(file.metadata.num_row_groups)]
            return tuple((chunk.data_page_offset, chunk.total_compressed_size) for chunk in chunks)

    @contextmanager
    def picker(self, path: Path, *, name: str) -> Iterator[Pick]:
        """Records by row number: the row groups that hold them are read, out of a memory map."""
        with self._open(str(path), name) as file:

            def pick(rows: Sequence[int]) -> list[bytes]:
                group_of, within = np.divmod(np.asarray(rows), self.group)
                groups = np.unique(group_of)
                column = file.read_row_groups(groups.tolist(), use_threads=False).column(0)
                places = np.searchsorted(groups, group_of) * self.group + within
                return [column[place].as_py()[SALT_BYTES:] for place in places.tolist()]

            yield pick

    def _open(self, source: Any, name: str) -> Any:
        if self._keys == "direct":
            properties = self._encryption.create_decryption_properties(self._key, aad_prefix=name.encode())
        else:
            properties = self._factory().file_decryption_properties(self._encryption.KmsConnectionConfig())
        return self._parquet.ParquetFile(source, memory_map=True, pre_buffer=False, decryption_properties=properties)

    def _encryption_properties(self, name: str) -> Any:
        if self._keys == "direct":
            return self._encryption.create_encryption_properties(
                self._key, aad_prefix=name.encode(), store_aad_prefix=False
            )
        configuration = self._encryption.EncryptionConfiguration(
            footer_key="key", uniform_encryption=True, data_key_length_bits=256
        )
        return self._factory().file_encryption_properties(self._encryption.KmsConnectionConfig(), configuration)

    def _factory(self) -> Any:
        key = self._key

        class StaticKey(self._encryption.KmsClient):  # type: ignore[misc, name-defined]
            """Wraps every key under one key in memory."""

            def __init__(self, _connection: object) -> None:
                super().__init__()

            def wrap_key(self, secret: bytes, master: str) -> str:
                return base64.b64encode(seal(key, secret, aad=master.encode())).decode()

            def unwrap_key(self, wrapped: str, master: str) -> bytes:
                return unseal(key, base64.b64decode(wrapped, validate=True), aad=master.encode(), step=_STEP)

        return self._encryption.CryptoFactory(StaticKey)


def _not_listed(what: str) -> IntegrityError:
    return IntegrityError(
        "bench.not-listed",
        f"a shard was refused: {what}",
        step=_STEP,
        fix="Put the shard that the list names under that name.",
    )


def _libraries() -> tuple[Any, Any, Any]:
    try:
        arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
        encryption = importlib.import_module("pyarrow.parquet.encryption")
        if not hasattr(encryption, "create_encryption_properties"):
            raise ImportError("this pyarrow has no direct keys for Parquet")
    except ImportError as error:
        raise ConfigError(
            "bench.no-parquet",
            f"encrypted Parquet cannot be measured: {error}",
            step="import pyarrow",
            fix="Run: pip install 'pyarrow>=26'",
        ) from error
    return arrow, parquet, encryption
