"""A disclosed record: the one that was trained on, or refused."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest

from caltrain.crypto.digests import to_text
from caltrain.crypto.merkle import inclusion_proof
from caltrain.errors import LineageError
from caltrain.records.commitment import RecordRef, commit
from caltrain.records.disclosure import Disclosure, check_disclosure
from support.samples import SHARD, records, refused, salts, sealed_shard

ROWS, SALTS = records(5), salts(5)
HEADER, _ = sealed_shard(ROWS)
COMMITMENTS = [commit(RecordRef("alpha", SHARD, i), salt=SALTS[i], record=ROWS[i]) for i in range(5)]


def text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def disclosure(leaf: int = 3, **changes: Any) -> Disclosure:
    honest = Disclosure(
        record_ref=RecordRef("alpha", SHARD, leaf),
        model="sha256:" + "0" * 64,
        records=5,
        salt=text(SALTS[leaf]),
        record=text(ROWS[leaf]),
        proof=tuple(text(p) for p in inclusion_proof(COMMITMENTS, leaf)),
    )
    return msgspec.structs.replace(honest, **changes)


def check(
    disclosed: Disclosure, *, root: str = HEADER.root, count: int = 5, commitment: str = to_text(COMMITMENTS[3])
) -> bytes:
    return check_disclosure(disclosed, root=root, records=count, commitment=commitment)


@pytest.mark.parametrize("leaf", range(5))
def test_the_record_that_was_trained_on_is_returned(leaf: int) -> None:
    wire = msgspec.json.encode(disclosure(leaf))
    disclosed = msgspec.json.decode(wire, type=Disclosure)
    assert check(disclosed, commitment=to_text(COMMITMENTS[leaf])) == ROWS[leaf]


ELSEWHERE = tuple(text(p) for p in inclusion_proof(COMMITMENTS, 2))
HONEST_PROOF = disclosure().proof
OTHER_ROOT = sealed_shard(records(5), shard="ff" * 16)[0].root

REFUSED: dict[str, tuple[Disclosure, dict[str, Any], str]] = {
    "another record": (disclosure(record=text(ROWS[2])), {}, "disclosure.substituted"),
    "another label": (
        disclosure(record=text(ROWS[3][:18] + b"\2\0\0\0" + ROWS[3][22:])),
        {},
        "disclosure.substituted",
    ),
    "another salt": (disclosure(salt=text(SALTS[2])), {}, "disclosure.substituted"),
    "another leaf's record, whole": (disclosure(2), {}, "disclosure.disproves"),
    "named as another leaf": (disclosure(record_ref=RecordRef("alpha", SHARD, 2)), {}, "disclosure.substituted"),
    "named as another party's": (disclosure(record_ref=RecordRef("beta", SHARD, 3)), {}, "disclosure.substituted"),
    "named as of another shard": (
        disclosure(record_ref=RecordRef("alpha", "ff" * 16, 3)),
        {},
        "disclosure.substituted",
    ),
    "another commitment traced": (disclosure(), {"commitment": to_text(COMMITMENTS[2])}, "disclosure.disproves"),
    "another record with a proof without form": (
        disclosure(record=text(ROWS[2]), proof=HONEST_PROOF[:-1]),
        {},
        "disclosure.substituted",
    ),
    "another number of records": (disclosure(records=6), {}, "disclosure.not-in-shard"),
    "another number of records in the manifest": (disclosure(), {"count": 6}, "disclosure.not-in-shard"),
    "another root in the manifest": (disclosure(), {"root": OTHER_ROOT}, "disclosure.not-in-shard"),
    "proof of another leaf": (disclosure(proof=ELSEWHERE), {}, "disclosure.not-in-shard"),
    "proof in another order": (disclosure(proof=HONEST_PROOF[::-1]), {}, "disclosure.not-in-shard"),
    "proof too short": (disclosure(proof=HONEST_PROOF[:-1]), {}, "merkle.malformed-proof"),
    "proof too long": (disclosure(proof=(*HONEST_PROOF, text(bytes(32)))), {}, "merkle.malformed-proof"),
    "proof of a short hash": (disclosure(proof=(text(bytes(31)), *HONEST_PROOF[1:])), {}, "merkle.malformed-proof"),
    "salt not base64": (disclosure(salt="?"), {}, "disclosure.malformed"),
    "record not base64": (disclosure(record="A"), {}, "disclosure.malformed"),
    "record not ASCII": (disclosure(record="é"), {}, "disclosure.malformed"),
    "proof not base64": (disclosure(proof=("A", *HONEST_PROOF[1:])), {}, "disclosure.malformed"),
    "short salt": (disclosure(salt=text(SALTS[3][:-1])), {}, "disclosure.malformed"),
    "salt with a byte of the record": (
        disclosure(salt=text(SALTS[3] + ROWS[3][:1]), record=text(ROWS[3][1:])),
        {},
        "disclosure.malformed",
    ),
}


@pytest.mark.parametrize(("disclosed", "known", "code"), REFUSED.values(), ids=REFUSED)
def test_what_was_not_trained_on_is_refused(disclosed: Disclosure, known: dict[str, Any], code: str) -> None:
    with refused(LineageError, code):
        check(disclosed, **known)


def test_a_leaf_beyond_the_shard_is_refused() -> None:
    place = RecordRef("alpha", SHARD, 5)
    commitment = commit(place, salt=SALTS[3], record=ROWS[3])
    with refused(LineageError, "merkle.malformed-proof"):
        check(disclosure(record_ref=place), commitment=to_text(commitment))


MALFORMED: dict[str, dict[str, Any]] = {
    "no records": {"records": 0},
    "endless salt": {"salt": "A" * 45},
    "endless record": {"record": "A" * ((8 << 20) + 1)},
    "endless proof": {"proof": ["A"] * 65},
    "endless hash in the proof": {"proof": ["A" * 45]},
    "unknown field": {"note": "x"},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_disclosure_is_refused_when_read(changes: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(msgspec.to_builtins(disclosure()) | changes, Disclosure)
