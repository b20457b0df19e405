"""Sessions: keys, lanes and budgets, all of them bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.enclave import sessions as module
from caltrain.enclave.sessions import MAX_SESSION_REQUESTS, Session, Sessions
from caltrain.errors import AccessError, IntegrityError, ProtocolError
from caltrain.serving.package import ServedUser
from caltrain.serving.session import LANES, LAST, SessionKeys
from support.samples import quick, refused, signer

PACKAGE = "ab" * 16
KEY = bytes(range(32))


def user(name: str = "una", *, budget: int = 10, key: str | None = None) -> ServedUser:
    return ServedUser(name=name, public_key=signer(key or name).public, budget=budget)


def theirs(session: Session) -> SessionKeys:
    """The user's end."""
    return SessionKeys(KEY, package=PACKAGE, session=session.id)


def take(sessions: Sessions, frame: bytes) -> bytes:
    """What the enclave does with a frame."""
    session, head = sessions.find(frame)
    raw = session.open(frame, head)
    sessions.used(session)
    return raw


def test_a_session_opens_what_its_user_sealed() -> None:
    sessions = Sessions(PACKAGE)
    session = sessions.open(user(), KEY)
    assert take(sessions, theirs(session).seal_request(3, 4, b"rows")) == b"rows"


@quick
@given(st.lists(st.tuples(st.sampled_from([0, 1, LANES - 1]), st.sampled_from([0, 1, 2, 7, LAST - 1])), max_size=12))
def test_a_lane_takes_each_number_once_and_only_upwards(sent: list[tuple[int, int]]) -> None:
    sessions = Sessions(PACKAGE)
    session = sessions.open(user(), KEY)
    last: dict[int, int] = {}
    for lane, number in sent:
        frame = theirs(session).seal_request(lane, number, b"")
        if number > last.get(lane, -1):
            assert take(sessions, frame) == b""
            last[lane] = number
        else:
            with refused(ProtocolError, "request.replayed"):
                take(sessions, frame)


def test_a_forged_frame_moves_nothing() -> None:
    sessions = Sessions(PACKAGE)
    session = sessions.open(user(), KEY)
    frame = theirs(session).seal_request(0, LAST - 1, b"rows")
    with refused(IntegrityError, "sealed.not-authentic"):
        take(sessions, frame[:-1] + bytes([frame[-1] ^ 1]))
    assert (session.last[0], session.requests) == (-1, 0)


def test_a_session_of_another_package_or_enclave_is_unknown() -> None:
    sessions, others = Sessions(PACKAGE), Sessions(PACKAGE)
    session = others.open(user(), KEY)
    with refused(ProtocolError, "session.unknown"):
        take(sessions, theirs(session).seal_request(0, 0, b""))


def test_two_sessions_with_one_key_do_not_open_each_others_frames() -> None:
    sessions = Sessions(PACKAGE)
    first, second = sessions.open(user(), KEY), sessions.open(user(), KEY)
    frame = theirs(first).seal_request(0, 0, b"")
    with refused(IntegrityError, "sealed.not-authentic"):
        take(sessions, frame[:1] + bytes.fromhex(second.id) + frame[17:])


def test_a_session_ends_after_its_last_request() -> None:
    sessions = Sessions(PACKAGE)
    session = sessions.open(user(), KEY)
    session.requests = MAX_SESSION_REQUESTS - 1
    take(sessions, theirs(session).seal_request(0, 0, b""))
    for _ in range(2):
        with refused(ProtocolError, "session.unknown"):
            take(sessions, theirs(session).seal_request(0, 1, b""))
    session.requests = 0  # it is not only passed over: it is gone
    with refused(ProtocolError, "session.unknown"):
        take(sessions, theirs(session).seal_request(0, 1, b""))


def test_of_too_many_sessions_the_longest_unused_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 3)
    sessions = Sessions(PACKAGE)
    first, second, third = (sessions.open(user(), KEY) for _ in range(3))
    take(sessions, theirs(first).seal_request(0, 0, b""))
    forged = theirs(second).seal_request(0, 0, b"")
    with refused(IntegrityError, "sealed.not-authentic"):
        take(sessions, forged[:-1] + bytes([forged[-1] ^ 1]))  # which is no use of it
    fourth = sessions.open(user(), KEY)
    with refused(ProtocolError, "session.unknown"):
        take(sessions, theirs(second).seal_request(0, 0, b""))
    for session in (first, third, fourth):
        take(sessions, theirs(session).seal_request(0, 1, b""))


def test_a_session_that_is_closed_meanwhile_is_not_taken_up_again() -> None:
    sessions = Sessions(PACKAGE)
    session = sessions.open(user(), KEY)
    sessions.close(session.id)
    sessions.close(session.id)
    sessions.used(session)
    with refused(ProtocolError, "session.unknown"):
        take(sessions, theirs(session).seal_request(0, 0, b""))


@quick
@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 20))
def test_a_budget_is_never_exceeded_and_a_refused_request_costs_nothing(asked: list[int], budget: int) -> None:
    sessions, una, spent = Sessions(PACKAGE), user(budget=budget), 0
    for rows in asked:
        if spent + rows <= budget:
            spent += rows
            assert sessions.charge(una, rows) == budget - spent
        else:
            with refused(AccessError, "user.budget-spent"):
                sessions.charge(una, rows)
        assert sessions.left(una) == budget - spent


def test_a_budget_is_of_the_key_whatever_it_is_called() -> None:
    sessions = Sessions(PACKAGE)
    sessions.charge(user("una", key="one"), 6)
    assert sessions.left(user("pat", key="one")) == 4
    assert sessions.left(user("una", key="two")) == 10
    assert sessions.left(user("una", key="one", budget=5)) == 0


def test_sessions_that_end_take_no_budget_with_them() -> None:
    sessions, una = Sessions(PACKAGE), user()
    session = sessions.open(una, KEY)
    sessions.charge(una, 7)
    sessions.close(session.id)
    sessions.open(una, KEY)
    assert sessions.left(una) == 3


def test_more_users_than_can_be_counted_are_refused_and_the_known_ones_still_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_USERS_COUNTED", 2)
    sessions = Sessions(PACKAGE)
    for name in ("una", "pat", "una"):
        sessions.open(user(name), KEY)
    with refused(AccessError, "user.too-many"):
        sessions.open(user("kim"), KEY)
    sessions.open(user("pat"), KEY)


def test_an_issuer_who_names_too_many_keeps_nobody_out_whom_the_package_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_USERS_COUNTED", 3)
    una = user()
    sessions = Sessions(PACKAGE, [una.public_key])
    sessions.open(user("one"), KEY)
    sessions.open(user("two"), KEY)
    with refused(AccessError, "user.too-many"):
        sessions.open(user("three"), KEY)
    assert sessions.left(sessions.open(una, KEY).user) == una.budget


def test_a_user_who_opens_too_many_pushes_out_their_own_longest_unused_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS_OF_USER", 2)
    sessions = Sessions(PACKAGE)
    others = sessions.open(user("pat"), KEY)
    first, second = sessions.open(user(), KEY), sessions.open(user(), KEY)
    sessions.used(first)
    third = sessions.open(user(), KEY)
    for session in (others, first, third):
        assert sessions.find(theirs(session).seal_request(0, 0, b""))[0] is session
    with refused(ProtocolError, "session.unknown"):
        sessions.find(theirs(second).seal_request(0, 0, b""))
