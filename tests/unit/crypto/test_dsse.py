"""DSSE envelopes: one key, one kind, one spelling; everything else is refused."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto import dsse
from caltrain.crypto.dsse import Envelope, PublicKey, Signature, SigningKey, envelope_from_json, open_envelope
from caltrain.errors import IntegrityError
from support.samples import flips, quick, refused, signer

STEP = "read note"
KEY = signer("alpha")
OTHER = signer("beta")


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    number: int = 0


class Loose(msgspec.Struct):
    body: dict[str, Any]


NOTE = Note("hello", 3)


def reopen(envelope: Envelope, *, kind: str = "note", key: str = KEY.public) -> Note:
    return open_envelope(envelope, kind, key, Note, step=STEP)


def with_signature(**changes: str) -> Envelope:
    envelope = KEY.sign("note", NOTE)
    signature = msgspec.structs.replace(envelope.signatures[0], **changes)
    return msgspec.structs.replace(envelope, signatures=(signature,))


def test_key_of_rfc_8032_section_7_1_test_1() -> None:
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    key = SigningKey(secret)
    assert key.public == "ed25519:" + base64.b64encode(public).decode()
    assert key.private_bytes() == secret


def test_pre_authentication_encoding_of_the_dsse_specification() -> None:
    encoded = dsse._pre_authentication("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_known_envelope() -> None:
    assert msgspec.json.encode(KEY.sign("note", NOTE)).decode() == (
        '{"payloadType":"application/vnd.caltrain.note.v1+json","payload":"eyJudW1iZXIiOjMsInRleHQiOiJoZWxsbyJ9",'
        '"signatures":[{"keyid":"ed25519:7XWt+SdiMBJHcFv7UXYfTmbXdHxSnMOjjP0N3LBW/Jw=","sig":"/qp6D5oigi1NEU72dc5drnOk'
        '6X8BQ+aZa6W+i8puCOb07xx49PlvO8XtRAsxfi1eapIRUFbsZTEc4eRrSDghCg=="}]}'
    )


def test_round_trip_over_json() -> None:
    envelope = envelope_from_json(msgspec.json.encode(KEY.sign("note", NOTE)), step=STEP)
    assert envelope.signer == KEY.public
    assert reopen(envelope) == NOTE


@quick
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**53) + 1, 2**53 - 1))
def test_every_payload_comes_back(text: str, number: int) -> None:
    assert reopen(KEY.sign("note", Note(text, number))) == Note(text, number)


def test_fresh_keys_differ() -> None:
    assert SigningKey().private_bytes() != SigningKey().private_bytes()


REFUSED: dict[str, tuple[Envelope, str, str]] = {
    "other kind": (KEY.sign("note", NOTE), "letter", KEY.public),
    "other key": (KEY.sign("note", NOTE), "note", OTHER.public),
    "signed by another in our name": (OTHER.sign("note", NOTE), "note", KEY.public),
    "our signature under another's key id": (with_signature(keyid=OTHER.public), "note", KEY.public),
    "type changed to the one expected": (
        msgspec.structs.replace(KEY.sign("letter", NOTE), payload_type=KEY.sign("note", NOTE).payload_type),
        "note",
        KEY.public,
    ),
    "signature of another payload": (
        with_signature(sig=KEY.sign("note", Note("hello", 4)).signatures[0].sig),
        "note",
        KEY.public,
    ),
    "payload of another signature": (
        msgspec.structs.replace(KEY.sign("note", NOTE), payload=KEY.sign("note", Note("hello", 4)).payload),
        "note",
        KEY.public,
    ),
    "payload not base64": (msgspec.structs.replace(KEY.sign("note", NOTE), payload="?" * 8), "note", KEY.public),
    "payload not ASCII": (msgspec.structs.replace(KEY.sign("note", NOTE), payload="é" * 8), "note", KEY.public),
    "signature not base64": (with_signature(sig="A"), "note", KEY.public),
    "signature too short": (with_signature(sig="AAAA"), "note", KEY.public),
    "signature empty": (with_signature(sig=""), "note", KEY.public),
    "key not base64": (with_signature(keyid="ed25519:?"), "note", "ed25519:?"),
    "key too short": (with_signature(keyid="ed25519:AAAA"), "note", "ed25519:AAAA"),
}


@pytest.mark.parametrize(("envelope", "kind", "key"), REFUSED.values(), ids=REFUSED)
def test_what_this_key_did_not_sign_as_this_kind_is_refused(envelope: Envelope, kind: str, key: str) -> None:
    with refused(IntegrityError, "signature.invalid"):
        reopen(envelope, kind=kind, key=key)


def test_a_second_spelling_of_the_same_signature_is_refused() -> None:
    sig = KEY.sign("note", NOTE).signatures[0].sig
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    respelled = sig[:-3] + digits[digits.index(sig[-3]) | 1] + "=="
    assert respelled != sig
    assert base64.b64decode(respelled) == base64.b64decode(sig)
    with refused(IntegrityError, "signature.invalid"):
        reopen(with_signature(sig=respelled))


def test_every_flipped_bit_of_an_envelope_is_refused() -> None:
    for changed in flips(msgspec.json.encode(KEY.sign("note", NOTE))):
        with pytest.raises(IntegrityError):
            reopen(envelope_from_json(changed, step=STEP))


def test_every_truncated_envelope_is_refused() -> None:
    raw = msgspec.json.encode(KEY.sign("note", NOTE))
    for length in range(len(raw)):
        with refused(IntegrityError, "envelope.malformed"):
            envelope_from_json(raw[:length], step=STEP)


@pytest.mark.parametrize(
    "value", [{"text": 1}, {"text": "a", "more": 1}, {}, ["text"], "text", None, {"text": "a", "number": 2**40 + 0.5}]
)
def test_a_signed_payload_of_another_form_is_refused(value: object) -> None:
    with refused(IntegrityError, "payload.malformed"):
        reopen(KEY.sign("note", value))


def signed(body: bytes) -> Envelope:
    payload_type = KEY.sign("note", NOTE).payload_type
    sig = KEY._key.sign(dsse._pre_authentication(payload_type, body))
    signature = Signature(keyid=KEY.public, sig=base64.b64encode(sig).decode())
    return Envelope(payload_type=payload_type, payload=base64.b64encode(body).decode(), signatures=(signature,))


@pytest.mark.parametrize("body", [b"", b"\xff", b'{"text":"a"}x', b'{"body":{"a":' + b"[" * 50_000], ids=repr)
def test_a_signed_payload_that_is_not_json_is_refused(body: bytes) -> None:
    with refused(IntegrityError, "payload.malformed"):
        open_envelope(signed(body), "note", KEY.public, Loose, step=STEP)


def test_signed_bytes_need_not_be_canonical() -> None:
    assert open_envelope(signed(b' { "text" : "a" } '), "note", KEY.public, Note, step=STEP) == Note("a")


def fields(**changes: object) -> bytes:
    table = msgspec.to_builtins(KEY.sign("note", NOTE))
    return msgspec.json.encode(table | changes)


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"caltrain",
    "not UTF-8": b'{"\xff":1}',
    "a list": b"[]",
    "an unknown field": fields(more=1),
    "no signature": fields(signatures=[]),
    "two signatures": fields(signatures=msgspec.to_builtins(KEY.sign("note", NOTE).signatures) * 2),
    "a key of another scheme": fields(signatures=[{"keyid": "rsa:AAAA", "sig": ""}]),
    "a signature of 89 characters": fields(signatures=[{"keyid": KEY.public, "sig": "A" * 89}]),
    "an endless type": fields(payloadType="x" * 121),
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_envelope_is_refused(raw: bytes) -> None:
    with refused(IntegrityError, "envelope.malformed"):
        envelope_from_json(raw, step=STEP)


def test_an_envelope_beyond_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = msgspec.json.encode(KEY.sign("note", NOTE))
    monkeypatch.setattr(dsse, "MAX_ENVELOPE_BYTES", len(raw))
    assert envelope_from_json(raw, step=STEP).signer == KEY.public
    with refused(IntegrityError, "envelope.malformed"):
        envelope_from_json(raw + b" ", step=STEP)


@quick
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with refused(IntegrityError, "envelope.malformed"):
        envelope_from_json(raw, step=STEP)


@given(st.binary(min_size=32, max_size=32))
def test_a_key_has_one_text_form(secret: bytes) -> None:
    public = SigningKey(secret).public
    assert msgspec.convert(public, PublicKey) == public


@pytest.mark.parametrize(
    "text",
    [
        "ed25519:" + "A" * 42 + "B=",  # the same 32 bytes as A...A=
        "ed25519:" + "A" * 43,
        "ed25519:" + "A" * 44 + "=",
        "ed25519:" + "A" * 43 + "=\n",
        "ed25519:" + "-" * 43 + "=",
        "A" * 43 + "=",
    ],
)
def test_another_spelling_is_no_key(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, PublicKey)
