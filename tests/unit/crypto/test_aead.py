"""AES-256-GCM messages and numbered frames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.aead import OVERHEAD, TAG_BYTES, FrameCipher, seal, unseal
from caltrain.errors import IntegrityError
from support.samples import flips, quick, refused

KEY = bytes(range(32))
STEP = "open"


def test_known_sealed_message() -> None:
    version, nonce = "01", "000102030405060708090a0b"
    sealed = bytes.fromhex(version + nonce + "2f67ba77aa352c6bab338b8b061e123fb66f940067")
    assert unseal(KEY, sealed, aad=b"place", step=STEP) == b"hello"


@pytest.mark.parametrize(
    ("plaintext", "frame"),
    [
        ("", "530f8afbc74536b9a963b4f1c4cb738b"),
        ("00" * 16, "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"),
    ],
)
def test_frame_0_is_test_cases_13_and_14_of_the_gcm_specification(plaintext: str, frame: str) -> None:
    cipher = FrameCipher(bytes(32), context=b"")
    assert cipher.seal(0, bytes.fromhex(plaintext)).hex() == frame
    assert cipher.unseal(0, bytes.fromhex(frame), step=STEP).hex() == plaintext


def test_known_frame() -> None:
    assert (
        FrameCipher(KEY, context=b"shard").seal(258, b"record").hex() == "7f4d73f916f840d6eff4758e529e23ee41003cde9460"
    )


@quick
@given(st.binary(max_size=100), st.binary(max_size=20))
def test_round_trip(plaintext: bytes, aad: bytes) -> None:
    sealed = seal(KEY, memoryview(plaintext), aad=aad)
    assert len(sealed) == len(plaintext) + OVERHEAD
    assert unseal(KEY, memoryview(sealed), aad=aad, step=STEP) == plaintext


def test_sealing_twice_gives_two_messages() -> None:
    assert seal(KEY, b"same", aad=b"") != seal(KEY, b"same", aad=b"")


def test_every_flipped_bit_is_refused() -> None:
    for changed in flips(seal(KEY, b"some text", aad=b"place")):
        with refused(IntegrityError, "sealed.not-authentic"):
            unseal(KEY, changed, aad=b"place", step=STEP)


def test_every_truncated_message_is_refused() -> None:
    sealed = seal(KEY, b"some text", aad=b"place")
    for length in range(len(sealed)):
        with refused(IntegrityError, "sealed.not-authentic"):
            unseal(KEY, sealed[:length], aad=b"place", step=STEP)


@pytest.mark.parametrize(("key", "aad"), [(KEY, b"elsewhere"), (KEY, b""), (bytes(32), b"place")])
def test_another_key_or_place_is_refused(key: bytes, aad: bytes) -> None:
    with refused(IntegrityError, "sealed.not-authentic"):
        unseal(key, seal(KEY, b"some text", aad=b"place"), aad=aad, step=STEP)


@quick
@given(st.integers(0, 2**32), st.binary(max_size=100), st.binary(max_size=20))
def test_frame_round_trip(index: int, plaintext: bytes, context: bytes) -> None:
    cipher = FrameCipher(KEY, context=context)
    frame = cipher.seal(index, plaintext)
    assert len(frame) == len(plaintext) + TAG_BYTES
    assert cipher.unseal(index, memoryview(frame), step=STEP) == plaintext


@pytest.mark.parametrize(
    ("key", "context", "index"), [(KEY, b"shard", 8), (KEY, b"other", 7), (bytes(32), b"shard", 7)]
)
def test_a_frame_of_another_index_context_or_key_is_refused(key: bytes, context: bytes, index: int) -> None:
    frame = FrameCipher(KEY, context=b"shard").seal(7, b"record")
    with refused(IntegrityError, "sealed.not-authentic"):
        FrameCipher(key, context=context).unseal(index, frame, step=STEP)


def test_every_flipped_bit_and_every_truncation_of_a_frame_is_refused() -> None:
    cipher = FrameCipher(KEY, context=b"shard")
    frame = cipher.seal(7, b"record")
    for changed in (*flips(frame), *(frame[:n] for n in range(len(frame)))):
        with refused(IntegrityError, "sealed.not-authentic"):
            cipher.unseal(7, changed, step=STEP)
