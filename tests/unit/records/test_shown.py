"""A disclosure for its readers: they open it, nobody else does, and nothing of it can be exchanged."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest

from caltrain.crypto.aead import seal
from caltrain.crypto.dsse import SigningKey
from caltrain.crypto.hpke import HpkePrivateKey, seal_to
from caltrain.crypto.kdf import derive
from caltrain.errors import AccessError, IntegrityError
from caltrain.records import shown
from caltrain.records.commitment import RecordRef
from caltrain.records.shown import Reading, SealedDisclosure, open_disclosure, seal_disclosure
from support.samples import SHARD, refused

UNA, PAT = (Reading(name, HpkePrivateKey(name.encode() * 8 + bytes(8))) for name in ("una", "pat"))
PLACE, MODEL = RecordRef("alpha", SHARD, 3), "sha256:" + "0" * 64
INNER = SigningKey(bytes(32)).sign("disclosure", {"record": "the secret"})
READERS = {reading.name: reading.key.public for reading in (UNA, PAT)}
SEALED = seal_disclosure(INNER, PLACE, model=MODEL, readers=READERS)


@pytest.mark.parametrize("reading", [UNA, PAT], ids=lambda reading: reading.name)
def test_every_reader_opens_it(reading: Reading) -> None:
    wire = msgspec.json.encode(SEALED)
    assert open_disclosure(msgspec.json.decode(wire, type=SealedDisclosure), reading) == INNER


def test_it_shows_nothing_of_what_is_in_it_and_is_another_each_time() -> None:
    again = seal_disclosure(INNER, PLACE, model=MODEL, readers=READERS)
    assert again.sealed != SEALED.sealed
    content = base64.b64decode(SEALED.sealed)
    assert INNER.payload.encode() not in content
    assert INNER.signatures[0].sig.encode() not in content


def test_who_is_not_named_does_not_open_it() -> None:
    with refused(AccessError, "disclosure.not-for-you") as caught:
        open_disclosure(SEALED, Reading("eve", UNA.key))
    assert "pat, una" in caught.value.what
    nobody = seal_disclosure(INNER, PLACE, model=MODEL, readers={})
    with refused(AccessError, "disclosure.not-for-you"):
        open_disclosure(nobody, UNA)


@pytest.mark.parametrize("name", ["una", "pat"])
def test_a_name_without_its_key_does_not_open_it(name: str) -> None:
    with refused(IntegrityError, "hpke.not-authentic"):
        open_disclosure(SEALED, Reading(name, HpkePrivateKey()))


def test_the_key_of_one_reader_does_not_open_what_is_sealed_to_another() -> None:
    exchanged = {"una": SEALED.readers["pat"], "pat": SEALED.readers["una"]}
    for reading in (UNA, PAT):
        with refused(IntegrityError, "hpke.not-authentic"):
            open_disclosure(msgspec.structs.replace(SEALED, readers=exchanged), reading)
        with refused(IntegrityError, "hpke.not-authentic"):
            open_disclosure(SEALED, Reading(reading.name, (PAT if reading is UNA else UNA).key))


OTHER = seal_disclosure(INNER, PLACE, model=MODEL, readers=READERS)
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another record": ({"record_ref": RecordRef("alpha", SHARD, 4)}, "hpke.not-authentic"),
    "another party": ({"record_ref": RecordRef("beta", SHARD, 3)}, "hpke.not-authentic"),
    "another model": ({"model": "sha256:" + "1" * 64}, "hpke.not-authentic"),
    "the content of another": ({"sealed": OTHER.sealed}, "sealed.not-authentic"),
    "keys of another": ({"readers": OTHER.readers}, "sealed.not-authentic"),
    "a short key": ({"readers": {"una": "AAAA"}}, "hpke.not-authentic"),
    "a key that is not base64": ({"readers": {"una": "?"}}, "disclosure.unreadable"),
    "content that is not base64": ({"sealed": "?"}, "disclosure.unreadable"),
    "no content": ({"sealed": ""}, "sealed.not-authentic"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_of_it_can_be_exchanged(what: str) -> None:
    changes, code = CHANGES[what]
    with refused(IntegrityError, code):
        open_disclosure(msgspec.structs.replace(SEALED, **changes), UNA)


@pytest.mark.parametrize("key", [b"", b"short", bytes(64)])
def test_a_contributor_that_seals_otherwise_than_it_should_makes_no_other_error(key: bytes) -> None:
    place = shown._place(PLACE, MODEL)
    content = seal(derive(key, "disclosure/v1"), b"<html>", aad=place)
    odd = msgspec.structs.replace(
        SEALED,
        sealed=base64.b64encode(content).decode(),
        readers={"una": base64.b64encode(seal_to(UNA.key.public, key, info=shown._info(place, "una"))).decode()},
    )
    with refused(IntegrityError, "envelope.malformed"):
        open_disclosure(odd, UNA)


def test_a_reader_without_a_sound_key_is_named() -> None:
    with refused(IntegrityError, "hpke.bad-key"):
        seal_disclosure(INNER, PLACE, model=MODEL, readers={"una": "xwing:AAAA"})
