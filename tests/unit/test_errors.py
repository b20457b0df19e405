"""The error families: what they print, their exit codes, and how they cross a wire."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain import errors
from caltrain.errors import FAMILIES, UNDECODABLE, CaltrainError, ProtocolError, from_wire
from support.samples import quick

EXIT_CODES = {
    "ConfigError": 10,
    "DataError": 11,
    "IntegrityError": 12,
    "AttestationError": 13,
    "ProvisioningError": 14,
    "ProtocolError": 15,
    "AccessError": 16,
    "LineageError": 17,
    "EnvironmentFault": 18,
}


def test_families_and_exit_codes_are_stable() -> None:
    assert {name: family.exit_code for name, family in FAMILIES.items()} == EXIT_CODES
    defined = {c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CaltrainError)}
    assert defined == {*EXIT_CODES, "CaltrainError"}
    assert CaltrainError.exit_code == 1


@pytest.mark.parametrize("family", FAMILIES.values())
def test_an_error_says_what_failed_where_and_what_to_do(family: type[CaltrainError]) -> None:
    error = family("shard.empty", "a shard has no records", step="seal", fix="Seal one.")
    assert str(error) == "shard.empty: a shard has no records (step: seal). Seal one."
    assert error.diagnostics() == {
        "family": family.__name__,
        "code": "shard.empty",
        "what": "a shard has no records",
        "step": "seal",
        "fix": "Seal one.",
    }


@pytest.mark.parametrize("family", FAMILIES.values())
def test_an_error_crosses_a_wire_whole(family: type[CaltrainError]) -> None:
    sent = family("shard.empty", "a shard has no records", step="seal", fix="Seal one.")
    received = from_wire(msgspec.json.decode(msgspec.json.encode(sent.diagnostics())))
    assert type(received) is family
    assert received.diagnostics() == sent.diagnostics()


@pytest.mark.parametrize(
    "fields", [None, [], "text", {}, {"family": 3, "code": None}, {"code": "", "what": ""}, {1: 2}]
)
def test_what_is_no_error_on_the_wire_is_a_protocol_error(fields: object) -> None:
    received = from_wire(fields)
    assert type(received) is ProtocolError
    assert received.code == "protocol.unreadable-error"
    assert all(received.diagnostics().values())


def test_a_family_that_does_not_exist_is_a_protocol_error() -> None:
    received = from_wire({"family": "SystemExit", "code": "x.y", "what": "w", "step": "s", "fix": "f"})
    assert type(received) is ProtocolError
    assert (received.code, received.what, received.step, received.fix) == ("x.y", "w", "s", "f")


def test_the_text_of_the_other_side_is_bounded() -> None:
    received = from_wire(dict.fromkeys(("family", "code", "what", "step", "fix"), "x" * 10_000))
    assert [len(getattr(received, key)) for key in ("code", "what", "step", "fix")] == [2000] * 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["family", "code", "what", "step", "fix"])


@quick
@given(JSON | st.dictionaries(KEYS, JSON | st.sampled_from([*FAMILIES]), max_size=5))
def test_rebuilding_an_error_never_fails(fields: object) -> None:
    assert isinstance(from_wire(fields), CaltrainError)


@pytest.mark.parametrize("raw", [b"", b"[", b"\xff", b'"\xff"', b'{"\xff":1}', b'{"a":1}', b"[" * 100_000])
def test_everything_that_decoding_raises_is_named(raw: bytes) -> None:
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        with pytest.raises(UNDECODABLE):
            decode(raw + b"\xc1", type=dict[str, str])


def test_the_other_sides_text_cannot_write_on_the_terminal() -> None:
    error = from_wire({"family": "DataError", "code": "a.b", "what": "x\x1b[2Jy\r\x07", "step": "\x00", "fix": "z"})
    assert (error.what, error.step) == ("x[2Jy", "remote")
