"""Fixed keys, a small plan and small shards for tests of the vocabulary; none of it needs torch."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings

from caltrain.crypto.dsse import SigningKey
from caltrain.errors import CaltrainError
from caltrain.plan import Plan, plan_from_json
from caltrain.records.schema import DataSchema, encode_record
from caltrain.records.shard import ShardHeader, write_shard

quick = settings(deadline=None, max_examples=60)

BYTES = DataSchema(shape=(1, 2, 3), classes=("cat", "dog", "owl"))
FLOATS = DataSchema(shape=(2, 1, 2), dtype="f32", classes=("cat", "dog"))
SHARD = "00112233445566778899aabbccddeeff"
MEASUREMENT = "sha384:" + "5a" * 48
DATA_KEY = bytes(range(32))


def refused(family: type[CaltrainError], code: str) -> pytest.RaisesExc[CaltrainError]:
    """Expect an error of that family with that code."""
    return pytest.raises(family, match=rf"^{re.escape(code)}: ")


def signer(name: str) -> SigningKey:
    """The same key for the same name, in every run of the tests."""
    return SigningKey(hashlib.sha256(name.encode()).digest())


def flips(raw: bytes, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """`raw` with each single bit of bytes `start` to `stop` flipped."""
    for position in range(start, len(raw) if stop is None else stop):
        for bit in range(8):
            changed = bytearray(raw)
            changed[position] ^= 1 << bit
            yield bytes(changed)


def records(count: int, schema: DataSchema = BYTES) -> list[bytes]:
    """Distinct canonical records, labels in turn."""
    shape, kind = schema.shape, schema.numpy_dtype
    return [encode_record(schema, np.full(shape, i, dtype=kind), i % len(schema.classes)) for i in range(count)]


def salts(count: int) -> list[bytes]:
    """Distinct salts, the same in every run."""
    return [hashlib.sha256(b"salt%d" % i).digest() for i in range(count)]


def sealed_shard(
    rows: Sequence[bytes], *, contributor: str = "alpha", shard: str = SHARD, schema: DataSchema = BYTES
) -> tuple[ShardHeader, bytes]:
    """A shard of `contributor`, signed with its key and sealed under `DATA_KEY`."""
    out = io.BytesIO()
    header = write_shard(
        out,
        signer=signer(contributor),
        data_key=DATA_KEY,
        contributor=contributor,
        shard_id=shard,
        schema=schema,
        records=rows,
        salts=salts(len(rows)),
    )
    return header, out.getvalue()


PLAN: dict[str, Any] = {
    "version": 1,
    "name": "three animals",
    "model": {
        "layers": [
            {"type": "conv", "filters": 4},
            {"type": "dropout", "p": 0.25},
            {"type": "conv", "filters": 8, "activation": "leaky"},
            {"type": "maxpool"},
            {"type": "flatten"},
            {"type": "linear", "units": 3},
        ]
    },
    "partition": {"front": 1, "head": 1},
    "data": {"shape": [1, 4, 4], "classes": ["cat", "dog", "owl"]},
    "training": {"epochs": 2, "batch": 8, "learning_rate": 0.05, "augment": {"shift": 1}},
    "parties": [
        {"name": "alpha", "public_key": signer("alpha").public},
        {"name": "beta", "public_key": signer("beta").public, "min_records": 10},
    ],
    "users": [{"name": "una", "public_key": signer("una").public, "may": ["predict", "trace"], "budget": 100}],
    "enclave": {"measurement": MEASUREMENT},
    "trace": {"neighbours": 5},
    "release": {"reveal_seed": True},
}
"""A plan as people write it: every section, few of the defaults."""


def plan(**changes: Any) -> Plan:
    """`PLAN` with top-level fields replaced, checked."""
    return plan_from_json(msgspec.json.encode(PLAN | changes))
