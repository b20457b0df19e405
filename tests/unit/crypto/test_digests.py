"""Digests: domains, length prefixes, the text form; canonical JSON after RFC 8785."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.crypto.digests import Digest, canonical_json, digest, hash_parts, same, to_raw, to_text
from caltrain.errors import ConfigError, IntegrityError
from support.samples import quick, refused

HEX = "0123456789abcdef" * 4
DOMAIN = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8)
PARTS = st.lists(st.binary(max_size=4), max_size=3)


def test_known_digest() -> None:
    expected = "sha256:854d5eeb9803a66452ec3ffd8d63d75d08af732227e54f50ef7b982bd7f0b850"
    assert digest("test/v1", b"one", b"") == expected


def test_the_bytes_hashed_are_prefix_domain_nul_and_length_prefixed_parts() -> None:
    written = b"caltrain:test/v1\0" + bytes(7) + b"\x03one" + bytes(8)
    assert hash_parts("test/v1", b"one", memoryview(b"")) == hashlib.sha256(written).digest()


@quick
@given(DOMAIN, PARTS, DOMAIN, PARTS)
def test_two_domains_or_lists_of_parts_never_share_a_digest(
    domain: str, parts: list[bytes], other_domain: str, other_parts: list[bytes]
) -> None:
    equal = (domain, parts) == (other_domain, other_parts)
    assert (hash_parts(domain, *parts) == hash_parts(other_domain, *other_parts)) == equal


def test_a_byte_moved_over_the_border_of_two_parts_is_another_digest() -> None:
    assert len({digest("t", b"ab", b"c"), digest("t", b"a", b"bc"), digest("t", b"abc"), digest("ta", b"bc")}) == 4


@given(st.binary(min_size=32, max_size=32))
def test_text_form_round_trip(raw: bytes) -> None:
    assert to_raw(to_text(raw)) == raw
    assert msgspec.convert(to_text(raw), Digest) == to_text(raw)


NO_DIGESTS = {
    "empty": "",
    "bare": HEX,
    "other algorithm": f"sha512:{HEX}",
    "upper case": f"sha256:{HEX.upper()}",
    "short": f"sha256:{HEX[:-1]}",
    "long": f"sha256:{HEX}0",
    "not hexadecimal": f"sha256:{HEX[:-1]}g",
    "spaces that a hex decoder skips": "sha256:" + " " * 64,
    "newline": f"sha256:{HEX}\n",
    "something before": f" sha256:{HEX}",
}


@pytest.mark.parametrize("text", NO_DIGESTS.values(), ids=NO_DIGESTS)
def test_another_form_is_no_digest(text: str) -> None:
    with refused(IntegrityError, "digest.form"):
        to_raw(text)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, Digest)


def test_same_compares_text_and_bytes() -> None:
    assert same("abc", b"abc")
    assert same(b"abc", "abc")
    assert not same("abc", "abd")
    assert not same("abc", "ab")
    assert not same("é", "e")


class Sample(msgspec.Struct):
    b: int
    a: str = "x"


CANONICAL: dict[str, tuple[object, str]] = {
    "RFC 8785, 3.2.3": (
        {
            "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
            "string": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/",
            "literals": [None, True, False],
        },
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}',
    ),
    "keys by UTF-16 code units": (
        {"\u20ac": 1, "\r": 2, "1": 3, "\U0001f600": 4, "\ufb33": 5},
        '{"\\r":2,"1":3,"\u20ac":1,"\U0001f600":4,"\ufb33":5}',
    ),
    "struct with default": (Sample(b=1), '{"a":"x","b":1}'),
    "whole float as integer": ([1.0, -0.0, 1], "[1,0,1]"),
    "tuple": ((1, "a"), '[1,"a"]'),
    "largest integer": (2**53 - 1, "9007199254740991"),
}


@pytest.mark.parametrize(("value", "expected"), CANONICAL.values(), ids=CANONICAL)
def test_canonical_json(value: object, expected: str) -> None:
    assert canonical_json(value) == expected.encode()


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


NOT_CANONICAL: dict[str, object] = {
    "nan": float("nan"),
    "infinity": {"a": [float("inf")]},
    "integer beyond 2**53": 2**53,
    "negative integer beyond 2**53": -(2**53),
    "key that is no string": {1: 1},
    "unknown type": object(),
    "lone surrogate": "\ud800",
    "lone surrogate in a key": {"\ud800": 1},
    "nesting without end": deep(),
}


@pytest.mark.parametrize("value", NOT_CANONICAL.values(), ids=NOT_CANONICAL)
def test_a_value_without_canonical_form_is_refused(value: object) -> None:
    with refused(ConfigError, "json.not-canonical"):
        canonical_json(value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(-(2.0**53) + 1, 2.0**53 - 1)  # a larger whole one is written as an integer out of range
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abé€", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@quick
@given(JSON)
def test_canonical_json_is_json_of_the_same_value_and_a_fixed_point(value: Any) -> None:
    written = canonical_json(value)
    assert msgspec.json.decode(written) == value
    assert canonical_json(msgspec.json.decode(written)) == written


@quick
@given(st.dictionaries(st.text("abcé€", max_size=3), st.integers(0, 9), max_size=6))
def test_canonical_json_does_not_depend_on_the_order_of_keys(table: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(table.items()))) == canonical_json(table)
