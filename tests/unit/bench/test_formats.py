"""The two formats that are compared hold the same rows, and each refuses what the comparison says it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pyarrow.parquet.encryption
import pytest

from caltrain.bench.formats import EncryptedParquet, KeyUse, SealedShards
from caltrain.bench.ways import random_rows, schema_of
from caltrain.errors import ConfigError, IntegrityError
from caltrain.records.shard import ShardHeader
from support.samples import refused

SIZE = 24
ROWS = random_rows(SIZE, 10, seed=0)
RECORDS = [record for _, record in ROWS]
SHUFFLED = [7, 0, 9, 3, 4]
KEYS: tuple[KeyUse, ...] = ("direct", "kms")


def test_rows_repeat_for_a_seed_and_differ_for_another() -> None:
    assert random_rows(SIZE, 10, seed=0) == ROWS
    assert not set(ROWS) & set(random_rows(SIZE, 10, seed=1))
    assert {(len(salt), len(record)) for salt, record in ROWS} == {(32, schema_of(SIZE).record_bytes)}


def test_a_shard_gives_its_records_back_in_order_and_at_random(tmp_path: Path) -> None:
    shards = SealedShards(schema_of(SIZE))
    raw, header = shards.write(ROWS)
    assert list(shards.read(raw, header)) == RECORDS
    (tmp_path / "shard").write_bytes(raw)
    with shards.picker(tmp_path / "shard", header) as pick:
        assert pick(SHUFFLED) == [RECORDS[i] for i in SHUFFLED]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("group", [1, 4, 16])
def test_parquet_gives_its_records_back_in_order_and_at_random(keys: KeyUse, group: int, tmp_path: Path) -> None:
    parquet = EncryptedParquet(group=group, keys=keys)
    raw = parquet.write(ROWS, name="a")
    assert list(parquet.read(raw, name="a")) == RECORDS
    (tmp_path / "parquet").write_bytes(raw)
    with parquet.picker(tmp_path / "parquet", name="a") as pick:
        assert pick(SHUFFLED) == [RECORDS[i] for i in SHUFFLED]


@pytest.mark.parametrize("keys", KEYS)
def test_no_record_lies_in_a_parquet_file_in_clear(keys: KeyUse) -> None:
    raw = EncryptedParquet(group=4, keys=keys).write(ROWS, name="a")
    assert not any(record[-SIZE:] in raw or salt in raw for salt, record in ROWS)


def test_units_are_the_frames_and_the_row_groups() -> None:
    shards = SealedShards(schema_of(SIZE))
    raw, header = shards.write(ROWS)
    frames = shards.units(raw, header)
    assert len(frames) == 10
    assert sum(frames[-1]) == len(raw)
    parquet = EncryptedParquet(group=4)
    groups = parquet.units(parquet.write(ROWS, name="a"), name="a")
    assert [offset + length for offset, length in groups[:-1]] == [offset for offset, _ in groups[1:]]
    assert len(groups) == 3


@pytest.mark.parametrize(
    "relisted",
    [
        lambda listed: msgspec.structs.replace(listed, shard="0" * 32),
        lambda listed: msgspec.structs.replace(listed, records=9),
        lambda listed: msgspec.structs.replace(listed, root="sha256:" + "0" * 64),
    ],
    ids=["id", "count", "root"],
)
def test_a_shard_that_is_not_the_listed_one_is_refused(relisted: Callable[[ShardHeader], ShardHeader]) -> None:
    shards = SealedShards(schema_of(SIZE))
    raw, header = shards.write(ROWS)
    with refused(IntegrityError, "bench.not-listed"):
        list(shards.read(raw, relisted(header)))


def test_parquet_is_bound_to_its_name_by_direct_keys_and_not_by_key_management() -> None:
    direct, kms = (EncryptedParquet(group=4, keys=keys) for keys in KEYS)
    with pytest.raises(OSError, match="decrypt"):
        list(direct.read(direct.write(ROWS, name="a"), name="b"))
    assert list(kms.read(kms.write(ROWS, name="a"), name="b")) == RECORDS


def test_a_missing_pyarrow_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with refused(ConfigError, "bench.no-parquet"):
        EncryptedParquet(group=4)


def test_a_pyarrow_without_direct_keys_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pyarrow.parquet.encryption, "create_encryption_properties")
    with refused(ConfigError, "bench.no-parquet"):
        EncryptedParquet(group=4)
