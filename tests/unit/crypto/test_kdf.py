"""Key derivation, against HKDF written out from RFC 5869."""

from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.kdf import derive
from support.samples import quick

SECRET = bytes(range(32))


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, sections 2.2 and 2.3, with SHA-256 and no salt."""
    key = hmac.digest(bytes(32), secret, hashlib.sha256)
    block, out, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.digest(key, block + info + bytes([counter]), hashlib.sha256)
        out, counter = out + block, counter + 1
    return out[:length]


def test_the_reference_is_hkdf() -> None:
    """RFC 5869, test case 3: no salt, no info."""
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert hkdf(b"\x0b" * 22, b"", 42).hex() == expected


@quick
@given(st.binary(max_size=40), st.lists(st.binary(max_size=5), max_size=3), st.integers(1, 100))
def test_derive_is_hkdf_with_purpose_and_length_prefixed_context(
    secret: bytes, context: list[bytes], length: int
) -> None:
    info = b"caltrain:test/v1\0" + b"".join(len(part).to_bytes(4, "big") + part for part in context)
    assert derive(secret, "test/v1", *context, length=length) == hkdf(secret, info, length)


def test_known_key() -> None:
    assert (
        derive(SECRET, "shard-frames/v1", b"alpha", bytes(16)).hex()
        == "aec9b72dbae81b3de42aaa3e2bf22b8ad241910932ecc812106060cb419f148a"
    )


@pytest.mark.parametrize(
    "other",
    [
        derive(SECRET, "two", b"ab", b"c"),
        derive(SECRET, "one", b"a", b"bc"),
        derive(SECRET, "one", b"abc"),
        derive(bytes(32), "one", b"ab", b"c"),
    ],
)
def test_another_purpose_context_or_secret_gives_another_key(other: bytes) -> None:
    assert derive(SECRET, "one", b"ab", b"c") != other
