"""Frames of a session: what was sealed opens in its place and nowhere else; what is no frame is refused by name."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from caltrain.errors import IntegrityError, ProtocolError
from caltrain.serving.session import LANES, LAST, REQUEST_OVERHEAD, Answer, SessionKeys, read_head
from support.samples import flips, quick, refused

PACKAGE, SESSION = "ab" * 16, "cd" * 16
KEY = bytes(range(32))
lanes, numbers = st.integers(0, LANES - 1), st.integers(0, LAST - 1)


def keys(*, key: bytes = KEY, package: str = PACKAGE, session: str = SESSION) -> SessionKeys:
    return SessionKeys(key, package=package, session=session)


def opened(frame: bytes, **whose: str) -> bytes:
    return keys(**whose).open_request(frame, read_head(frame))  # type: ignore[arg-type]


@quick
@given(lanes, numbers, st.binary(max_size=200))
def test_a_request_opens_as_it_was_sealed(lane: int, number: int, rows: bytes) -> None:
    frame = keys().seal_request(lane, number, rows)
    head = read_head(frame)
    assert (head.session, head.lane, head.number) == (SESSION, lane, number)
    assert len(frame) == REQUEST_OVERHEAD + len(rows)
    assert opened(frame) == rows


@quick
@given(lanes, numbers, st.booleans(), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=200))
def test_an_answer_opens_as_it_was_sealed(
    lane: int, number: int, audited: bool, wrong: int, left: int, table: bytes
) -> None:
    head = read_head(keys().seal_request(lane, number, b""))
    answer = Answer(audited, wrong, left, table)
    assert keys().open_answer(keys().seal_answer(head, answer), lane, number) == answer


@quick
@given(st.binary(max_size=80))
@example(b"")
@example(b"\x01" * REQUEST_OVERHEAD)
def test_whatever_comes_is_read_as_a_head_or_refused(frame: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        head = read_head(frame)
        assert len(frame) >= REQUEST_OVERHEAD
        assert frame[0] == 1
        assert (head.lane in range(LANES), head.number in range(LAST)) == (True, True)
        with refused(IntegrityError, "sealed.not-authentic"):
            keys().open_request(frame, head)
        return
    with refused(ProtocolError, "request.malformed"):
        read_head(frame)


def test_a_request_that_is_too_short_of_another_version_or_numbered_too_high_is_none() -> None:
    frame = keys().seal_request(0, 0, b"")
    for wrong in (frame[:-1], b"\x02" + frame[1:], keys().seal_request(0, LAST, b"")):
        with refused(ProtocolError, "request.malformed"):
            read_head(wrong)
    read_head(keys().seal_request(0, LAST - 1, b""))


def test_no_bit_of_a_request_can_change() -> None:
    frame = keys().seal_request(5, 9, b"rows")
    for changed in flips(frame):
        with pytest.raises((IntegrityError, ProtocolError)):
            opened(changed, session=read_head(changed).session)  # with the best keys there could be


def test_no_bit_of_an_answer_can_change() -> None:
    head = read_head(keys().seal_request(5, 9, b""))
    for changed in flips(keys().seal_answer(head, Answer(audited=True, wrong=0, budget_left=3, probabilities=b"abcd"))):
        with pytest.raises((IntegrityError, ProtocolError)):
            keys().open_answer(changed, 5, 9)


@pytest.mark.parametrize(
    "whose", [{"key": bytes(32)}, {"package": "00" * 16}, {"session": "00" * 16}], ids=lambda whose: next(iter(whose))
)
def test_other_keys_packages_and_sessions_open_nothing(whose: dict[str, str]) -> None:
    frame = keys().seal_request(0, 0, b"rows")
    with refused(IntegrityError, "sealed.not-authentic"):
        opened(frame, **whose)
    answer = keys().seal_answer(read_head(frame), Answer(audited=False, wrong=0, budget_left=0, probabilities=b""))
    with refused(IntegrityError, "sealed.not-authentic"):
        keys(**whose).open_answer(answer, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("lane", "number"), [(1, 0), (0, 1)])
def test_the_answer_to_another_request_is_foreign(lane: int, number: int) -> None:
    head = read_head(keys().seal_request(0, 0, b""))
    answer = keys().seal_answer(head, Answer(audited=False, wrong=0, budget_left=0, probabilities=b""))
    for other in (answer, answer[:20], b"", b"\x02" + answer[1:]):
        with refused(ProtocolError, "answer.foreign"):
            keys().open_answer(other, lane, number)
    relabelled = bytes([1, lane]) + number.to_bytes(8, "big") + answer[10:]
    with refused(IntegrityError, "sealed.not-authentic"):
        keys().open_answer(relabelled, lane, number)


def test_a_request_is_no_answer() -> None:
    frame = keys().seal_request(0, 0, bytes(13))
    with refused(IntegrityError, "sealed.not-authentic"):
        keys().open_answer(b"\x01" + bytes(9) + frame[26:], 0, 0)
