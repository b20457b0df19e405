"""The salted commitment to one record at one place."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.records.commitment import RecordRef, commit
from support.samples import SHARD, quick

SALT = bytes(range(32))
PLACE = RecordRef("alpha", SHARD, 7)


def test_known_commitment() -> None:
    expected = "180171faface8c6911356f3ab2bd2571e747da9c060bb815f865cfca46b13512"
    assert commit(PLACE, salt=SALT, record=b"record").hex() == expected


def test_the_bytes_hashed_are_salt_contributor_shard_leaf_and_record() -> None:
    def part(raw: bytes) -> bytes:
        return len(raw).to_bytes(8, "big") + raw

    parts = part(SALT) + part(b"alpha") + part(bytes.fromhex(SHARD)) + part((7).to_bytes(8, "big")) + part(b"record")
    expected = hashlib.sha256(b"caltrain:record/v1\0" + parts).digest()
    assert commit(PLACE, salt=SALT, record=b"record") == expected


REFERENCES = st.builds(
    RecordRef,
    party=st.sampled_from(["a", "ab", "b"]),
    shard=st.sampled_from(["00" * 16, "00" * 15 + "01"]),
    leaf=st.sampled_from([0, 1, 256, (1 << 32) - 1]),
)
SALTS = st.sampled_from([bytes(32), bytes(31) + b"\1"])
RECORDS = st.sampled_from([b"", b"a", b"ab"])


@quick
@given(REFERENCES, SALTS, RECORDS, REFERENCES, SALTS, RECORDS)
def test_another_place_salt_or_record_gives_another_commitment(
    ref: RecordRef, salt: bytes, record: bytes, other_ref: RecordRef, other_salt: bytes, other_record: bytes
) -> None:
    one = commit(ref, salt=salt, record=record)
    other = commit(other_ref, salt=other_salt, record=other_record)
    assert (one == other) == ((ref, salt, record) == (other_ref, other_salt, other_record))


def test_the_contributor_own_name_of_a_record_is_not_in_a_reference() -> None:
    assert msgspec.json.encode(PLACE) == f'{{"party":"alpha","shard":"{SHARD}","leaf":7}}'.encode()


BAD = {
    "name in upper case": ("Alpha", SHARD, 0),
    "no name": ("", SHARD, 0),
    "name that starts with a dash": ("-alpha", SHARD, 0),
    "name with a slash": ("a/b", SHARD, 0),
    "name with a line end": ("alpha\n", SHARD, 0),
    "name of 41 letters": ("a" * 41, SHARD, 0),
    "short shard": ("alpha", SHARD[:-1], 0),
    "shard in upper case": ("alpha", SHARD.upper(), 0),
    "shard with a line end": ("alpha", SHARD + "\n", 0),
    "negative leaf": ("alpha", SHARD, -1),
    "leaf beyond 32 bits": ("alpha", SHARD, 1 << 32),
}


@pytest.mark.parametrize(("party", "shard", "leaf"), BAD.values(), ids=BAD)
def test_what_is_no_reference_is_refused_when_read(party: str, shard: str, leaf: int) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"party": party, "shard": shard, "leaf": leaf}, RecordRef)
