"""What a verdict's statement holds besides words: records, and the root over its inputs."""

from __future__ import annotations

import base64

import pytest

from caltrain.crypto.digests import digest, to_raw, to_text
from caltrain.crypto.merkle import merkle_root
from caltrain.errors import IntegrityError
from caltrain.provenance.verdict import SuspectRecords, inputs_root
from caltrain.records.commitment import RecordRef

SHARD = "ab" * 16


def records(leaves: tuple[int, ...], commitments: str) -> SuspectRecords:
    return SuspectRecords(party="alpha", shard=SHARD, leaves=leaves, commitments=commitments)


def test_each_leaf_has_its_own_commitment() -> None:
    raw = bytes(range(64))
    found = records((7, 3), base64.b64encode(raw).decode()).by_record()
    assert found == {RecordRef("alpha", SHARD, 7): to_text(raw[:32]), RecordRef("alpha", SHARD, 3): to_text(raw[32:])}


BAD = {
    "too few": ((7, 3), base64.b64encode(bytes(32)).decode()),
    "too many": ((7,), base64.b64encode(bytes(64)).decode()),
    "a byte more": ((7,), base64.b64encode(bytes(33)).decode()),
    "half of the last": ((7, 3), base64.b64encode(bytes(48)).decode()),
    "a leaf twice": ((7, 7), base64.b64encode(bytes(64)).decode()),
    "no base64": ((7,), "*" * 44),
    "none": ((7,), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_commitments_that_are_not_one_for_each_leaf_are_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match=r"^verdict\.malformed: "):
        records(*BAD[name]).by_record()


def test_the_root_depends_on_every_input_and_on_their_order() -> None:
    one, other = digest("one"), digest("other")
    assert inputs_root([one, other]) == to_text(merkle_root([to_raw(one), to_raw(other)]))
    assert len({inputs_root([one, other]), inputs_root([other, one]), inputs_root([one]), inputs_root([one, one])}) == 4
