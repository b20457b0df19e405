"""The list of a repair: one form for one set of records, and only the list that the plan names."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from caltrain.errors import ConfigError, IntegrityError
from caltrain.records import quarantine as lists
from caltrain.records.commitment import RecordRef
from caltrain.records.quarantine import (
    FormerParty,
    Quarantine,
    Quarantined,
    Repair,
    decode_quarantine,
    file_digest,
    open_quarantine,
)
from support.samples import refused, signer

RUN, OTHER_RUN = "ab" * 16, "cd" * 16
MODEL, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
PLACES = [("alpha", "cd" * 16, 0), ("beta", "ab" * 16, 10), ("beta", "ab" * 16, 9), ("beta", "00" * 16, 11)]
ENTRIES = [Quarantined(RecordRef(*place), f"sha256:{number:064x}") for number, place in enumerate(PLACES)]
LIST = Quarantine.of(ENTRIES, run=RUN, model=MODEL)
REPAIR = Repair(run=RUN, model=MODEL, quarantine=file_digest(LIST.encode()), records=4)


def test_the_same_records_give_the_same_file_in_whatever_order_they_are_named() -> None:
    assert Quarantine.of([*reversed(ENTRIES), ENTRIES[1]], run=RUN, model=MODEL).encode() == LIST.encode()
    assert [entry.record.leaf for entry in LIST.entries] == [0, 11, 9, 10]
    assert LIST.commitments() == {entry.record: entry.commitment for entry in ENTRIES}


def test_the_plan_names_the_file_as_sha256sum_prints_it() -> None:
    assert REPAIR.quarantine == "sha256:" + hashlib.sha256(LIST.encode()).hexdigest()
    assert open_quarantine(LIST.encode(), REPAIR) == LIST


def test_a_record_with_two_commitments_is_refused() -> None:
    twice = [*ENTRIES, Quarantined(ENTRIES[0].record, OTHER)]
    with refused(ConfigError, "quarantine.two-commitments"):
        Quarantine.of(twice, run=RUN, model=MODEL)


def test_more_records_than_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_QUARANTINED", 3)
    with refused(ConfigError, "quarantine.too-many"):
        Quarantine.of(ENTRIES, run=RUN, model=MODEL)


FIELDS = msgspec.to_builtins(LIST)
FIRST = FIELDS["entries"][0]
MALFORMED: dict[str, Any] = {
    "another version": FIELDS | {"version": 2},
    "something more": FIELDS | {"more": 1},
    "no entries": {key: value for key, value in FIELDS.items() if key != "entries"},
    "another order": FIELDS | {"entries": FIELDS["entries"][::-1]},
    "one twice": FIELDS | {"entries": [FIRST, *FIELDS["entries"]]},
    "one twice with another commitment": FIELDS | {"entries": [FIRST | {"commitment": OTHER}, *FIELDS["entries"]]},
    "no commitment": FIELDS | {"entries": [FIRST | {"commitment": "sha1:0"}]},
    "a list": [],
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_list_of_another_form_is_refused(what: str) -> None:
    raw = msgspec.json.encode(MALFORMED[what])
    with refused(IntegrityError, "quarantine.malformed"):
        decode_quarantine(raw)
    with refused(IntegrityError, "quarantine.malformed"):
        open_quarantine(raw, msgspec.structs.replace(REPAIR, quarantine=file_digest(raw)))


@pytest.mark.parametrize("raw", [b"", b"\xff", b'{"entries":' + b"[" * 100_000])
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with refused(IntegrityError, "quarantine.malformed"):
        decode_quarantine(raw)


def test_a_list_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "MAX_QUARANTINE_BYTES", len(LIST.encode()) - 1)
    with refused(IntegrityError, "quarantine.malformed"):
        decode_quarantine(LIST.encode())


def test_no_byte_of_the_list_can_be_another_one() -> None:
    for position in range(len(LIST.encode())):
        raw = bytearray(LIST.encode())
        raw[position] ^= 1
        with refused(IntegrityError, "quarantine.other-list"):
            open_quarantine(bytes(raw), REPAIR)


@pytest.mark.parametrize("changes", [{"run": OTHER_RUN}, {"model": OTHER}, {"records": 3}])
def test_a_list_of_another_run_model_or_length_is_refused(changes: dict[str, Any]) -> None:
    with refused(IntegrityError, "quarantine.other-run"):
        open_quarantine(LIST.encode(), msgspec.structs.replace(REPAIR, **changes))


def test_a_repair_says_in_words_what_is_left_out() -> None:
    former = FormerParty(name="dogwood", public_key=signer("dogwood").public)
    told = msgspec.structs.replace(REPAIR, without=(former,)).in_words()
    assert told == (
        f"replaces model {MODEL} of run {RUN}: without the 4 records of the list {REPAIR.quarantine}, without dogwood"
    )
    assert "dogwood" not in REPAIR.in_words()
