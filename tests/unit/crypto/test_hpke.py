"""HPKE to an enclave: opens under its own key and info only."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caltrain.crypto.hpke import HpkePrivateKey, HpkePublicKey, seal_to
from caltrain.errors import IntegrityError
from support.samples import flips, refused

KEY = HpkePrivateKey()
RAW = base64.b64decode(KEY.public.removeprefix("xwing:"))
SEALED = seal_to(KEY.public, b"data key", info=b"transcript")
STEP = "open"


def test_sizes_are_those_of_x_wing_and_aes_gcm() -> None:
    assert len(RAW) == 1184 + 32
    assert len(SEALED) == 1088 + 32 + len(b"data key") + 16
    assert msgspec.convert(KEY.public, HpkePublicKey) == KEY.public


@settings(deadline=None, max_examples=20)
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_round_trip(plaintext: bytes, info: bytes) -> None:
    assert KEY.unseal(seal_to(KEY.public, plaintext, info=info), info=info, step=STEP) == plaintext


def test_sealing_twice_gives_two_messages() -> None:
    assert seal_to(KEY.public, b"data key", info=b"transcript") != SEALED


@pytest.mark.parametrize("info", [b"", b"transcript2", b"Transcript"])
def test_another_info_does_not_open(info: bytes) -> None:
    with refused(IntegrityError, "hpke.not-authentic"):
        KEY.unseal(SEALED, info=info, step=STEP)


def test_another_key_does_not_open() -> None:
    with refused(IntegrityError, "hpke.not-authentic"):
        HpkePrivateKey().unseal(SEALED, info=b"transcript", step=STEP)


@pytest.mark.parametrize("part", [range(3), range(1080, 1124), range(1125, 1144)], ids=["kem", "border", "text"])
def test_flipped_bits_do_not_open(part: range) -> None:
    for changed in flips(SEALED, part.start, part.stop):
        with refused(IntegrityError, "hpke.not-authentic"):
            KEY.unseal(changed, info=b"transcript", step=STEP)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 1087, 1088, 1119, 1120, 1121, 1135, 1136, len(SEALED) - 1])
def test_a_truncated_message_does_not_open(length: int) -> None:
    with refused(IntegrityError, "hpke.not-authentic"):
        KEY.unseal(SEALED[:length], info=b"transcript", step=STEP)


def named(raw: bytes) -> str:
    return "xwing:" + base64.b64encode(raw).decode()


BAD_KEYS = {
    "empty": "",
    "no scheme": base64.b64encode(RAW).decode(),
    "other scheme": "x25519:" + base64.b64encode(RAW).decode(),
    "not base64": "xwing:?",
    "not ASCII": "xwing:é",
    "short": named(RAW[:-1]),
    "long": named(RAW + b"\0"),
    "nothing": named(b""),
    "coefficients beyond the modulus": named(b"\xff" * 1184 + RAW[1184:]),
    "a curve point of small order": named(RAW[:1184] + bytes(32)),
}


@pytest.mark.parametrize("public", BAD_KEYS.values(), ids=BAD_KEYS)
def test_what_is_no_key_is_refused(public: str) -> None:
    with refused(IntegrityError, "hpke.bad-key"):
        seal_to(public, b"data key", info=b"transcript")


@pytest.mark.parametrize("text", ["xwing:", "xwing:AAAA\n", "AAAA", "xwing:" + "A" * 1700])
def test_what_does_not_look_like_a_key_is_refused_in_a_message(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, HpkePublicKey)


def test_a_key_from_a_secret_is_always_the_same_and_no_other() -> None:
    one, again, other = (HpkePrivateKey(secret) for secret in (bytes(32), bytes(32), b"1" * 32))
    assert one.public == again.public
    assert len({one.public, other.public, HpkePrivateKey().public, HpkePrivateKey().public}) == 4
    sealed = seal_to(one.public, b"seen", info=b"info")
    assert again.unseal(sealed, info=b"info", step="test") == b"seen"
    with pytest.raises(IntegrityError):
        other.unseal(sealed, info=b"info", step="test")
