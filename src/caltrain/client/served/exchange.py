"""What is said to the host and when to say it again, for both clients. Generators: they yield what is to be done.

A `Call` is answered with a `Reply`, a `Wait` with nothing, a `Renew` with the session that takes the place of one that
the enclave no longer has. What the host says is only a hint when to try again: tries and waits are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.client.served.handshake import MAX_OPENED, Expectations, Handshake
from caltrain.client.served.session import UNDER_WAY, Part, Prediction, Session, check_records, join
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES
from caltrain.errors import AccessError, CaltrainError, EnvironmentFault, ProtocolError
from caltrain.host_client import read_failure, read_json
from caltrain.serving.oip import LENGTH_HEADER, pack_sealed, unpack_sealed_reply
from caltrain.serving.package import Package
from caltrain.serving.session import Offer

PATIENCE = 60.0
"""Most seconds that one call may wait in all for a busy or restarting host."""
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=UNDER_WAY, keepalive_expiry=3)
"""Many servers end idle connections after 5 seconds: ours end before, so that no request meets one that is ending."""
_MAX_RENEWALS = 3
_RENEW = frozenset({"session.unknown", "serving.restarted", "model.unknown"})
"""The session's enclave is gone, or its version of the model is no longer served."""
_OTHER_ENCLAVE = frozenset({"nonce.unknown", "sealed.malformed", "hpke.not-authentic"})
"""The enclave was another one when the session was to be opened than the one that had attested."""
_COUNTED, _MAX_COUNTED = frozenset({"center.failed", "serving.too-slow"}), 2
"""The enclave may have counted the records already: they are not asked about more often than that."""
_SHORT = 0.05
_REPLY_OVERHEAD = 16 << 10
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One HTTP request; an answer of more than `limit` bytes is refused."""

    method: str
    path: str
    limit: int
    params: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Reply(NamedTuple):
    """The answer to a call. `headers` are looked up whatever their case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def good(self) -> bool:
        """Whether it is what was asked for: redirects and the like are not."""
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Wait:
    """Sleep."""

    seconds: float


class Patience:
    """The seconds that are left to wait. The least wait doubles: each try hands the host one more request to count."""

    def __init__(self, seconds: float) -> None:
        self._left = min(seconds, PATIENCE)
        self._next = _SHORT

    def pause(self, failure: CaltrainError, retry_after: str | None) -> Wait:
        """How long to wait before another try. Raises the failure where none is due, or nobody would wait so long."""
        told = float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None
        busy = isinstance(failure, AccessError) and failure.code == "session.busy"
        away = isinstance(failure, EnvironmentFault) and told is not None
        if not (busy or away):
            raise failure
        seconds, self._next = max(told or 0.0, self._next), self._next * 2
        return self._wait(failure, seconds)

    def moment(self, failure: CaltrainError) -> Wait:
        """A short wait, for something on this side. Raises the failure when nothing is left."""
        return self._wait(failure, _SHORT)

    def _wait(self, failure: CaltrainError, seconds: float) -> Wait:
        if seconds > self._left:
            raise failure
        self._left -= seconds
        return Wait(seconds)


@dataclass(frozen=True)
class Renew:
    """Open a session in the place of this one."""

    session: Session
    patience: Patience


Steps = Generator[Call | Wait | Renew, Any, T]


def open_session(
    expected: Expectations,
    model: str,
    version: str | None,
    clock: Callable[[], datetime],
    known: Package | None,
    patience: Patience,
) -> Steps[Session]:
    """Attest, verify, open a session. `known` is the package that was served until now."""
    asked = {"model": model} | ({"version": version} if version else {})
    others = 0
    while True:
        handshake = Handshake(expected, model, version, known=known)
        reply: Reply = yield Call("GET", "/attestation", MAX_ENVELOPE_BYTES, {"nonce": handshake.nonce} | asked)
        if reply.good:
            checked = handshake.check(read_json(reply.body, Offer), now=clock())
            path = f"{_path(checked.package.terms.name, checked.package.terms.revision)}/sessions"
            reply = yield Call("POST", path, MAX_OPENED, content=msgspec.json.encode(checked.request))
            if reply.good:
                return checked.open(reply.body)
            if read_failure(reply.status, reply.body).code in _OTHER_ENCLAVE and others < _MAX_RENEWALS:
                others += 1
                continue
        yield _pause(patience, reply)


def predict(session: Session, records: NDArray[np.generic], patience: Patience) -> Steps[Prediction]:
    """Ask about records (N, C, H, W), in as many requests as it takes.

    Raises DataError `ask.*` before anything is sealed, AccessError `user.budget-spent`, ProtocolError `model.changed`.
    """
    check_records(session.package, records)
    most, digest = session.package.terms.batch.rows, session.digest
    parts: list[Part] = []
    for start in range(0, len(records), most):
        session, part = yield from _ask(session, records[start : start + most], patience)
        if parts and session.digest != digest:
            raise ProtocolError(
                "model.changed",
                "the model's owner replaced it while it answered",
                step="ask",
                fix="Ask again: the new one then answers for all records.",
            )
        digest = session.digest
        parts.append(part)
    return join(session, parts)


def is_ready(model: str, revision: int) -> Steps[bool]:
    """Whether the host says that the model is ready."""
    reply: Reply = yield Call("GET", f"{_path(model, revision)}/ready", _REPLY_OVERHEAD)
    return reply.good


def _ask(session: Session, rows: NDArray[np.generic], patience: Patience) -> Steps[tuple[Session, Part]]:
    renewals = counted = 0
    while True:
        answer = yield from _once(session, rows, patience)
        if isinstance(answer, Part):
            return session, answer
        failure = read_failure(answer.status, answer.body)
        if failure.code in _RENEW and renewals < _MAX_RENEWALS:
            renewals += 1
            session = yield Renew(session, patience)
        else:
            counted += failure.code in _COUNTED
            if counted > _MAX_COUNTED:
                raise failure
            yield patience.pause(failure, answer.headers.get("Retry-After"))


def _once(session: Session, rows: NDArray[np.generic], patience: Patience) -> Steps[Part | Reply]:
    """One frame in a lane of its own: its checked answer, or what the host said instead."""
    while True:
        try:
            lane = session.acquire()
            break
        except AccessError as busy:
            yield patience.moment(busy)
    try:
        asked = session.seal(lane, rows)
        body, headers = pack_sealed(asked.frame)
        terms = session.package.terms
        limit = 4 * len(rows) * session.package.classes + _REPLY_OVERHEAD
        reply: Reply = yield Call(
            "POST", f"{_path(terms.name, terms.revision)}/infer", limit, content=body, headers=headers
        )
        return (
            session.open(asked, unpack_sealed_reply(reply.body, reply.headers.get(LENGTH_HEADER)))
            if reply.good
            else reply
        )
    finally:
        session.release(lane)


def _pause(patience: Patience, reply: Reply) -> Wait:
    return patience.pause(read_failure(reply.status, reply.body), reply.headers.get("Retry-After"))


def _path(model: str, revision: int) -> str:
    return f"/v2/models/{model}/versions/{revision}"
