"""An open session: seals records into its lanes, opens and checks the answers. No input or output here."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from caltrain.attestation.verify import Claims
from caltrain.errors import AccessError, DataError, IntegrityError, ProtocolError
from caltrain.serving.package import Package
from caltrain.serving.session import Answer, SessionKeys, SessionOpened

_STEP = "read answer"
_TOLERANCE = 1e-3
UNDER_WAY = 64
"""Requests of a session at once, of the 256 that a session may have: a host takes no more."""
Probabilities = NDArray[np.float32]


class Asked(NamedTuple):
    """A sealed request on its way."""

    frame: bytes
    lane: int
    number: int
    rows: int


class Part(NamedTuple):
    """The checked answer to one request."""

    probabilities: Probabilities
    audited: bool
    wrong: int
    budget_left: int


@dataclass(frozen=True)
class Prediction:
    """What the enclave said of N records.

    `probabilities` is (N, K) float32, its columns are called `names`; `classes` holds the likeliest name of each
    record, `indices` its column. `audited`: the enclave computed the center's part of every batch itself and got the
    same; `center_wrong`: how often, in all the batches that it looked at, it got something else. `budget_left` counts
    records. `package` is the digest of the package that answered, `model` of its model.
    """

    probabilities: Probabilities
    classes: list[str]
    indices: NDArray[np.int64]
    names: tuple[str, ...]
    audited: bool
    center_wrong: int
    budget_left: int
    package: str
    model: str


class Session:
    """Keys and lanes of one session. Threads may share it: each takes a lane of its own.

    Raises IntegrityError `session.mismatch` for an enclave that contradicts its package or its evidence.
    """

    def __init__(self, package: Package, claims: Claims, opened: SessionOpened, key: bytes) -> None:
        names = set(opened.classes)
        if len(opened.classes) != package.classes or len(names) != package.classes:
            raise _mismatch(f"{len(names)} classes, the package has {package.classes}")
        if opened.simulated != claims.simulated:
            raise _mismatch("whether the enclave is simulated is not what its evidence says")
        self.package, self.claims = package, claims
        self.digest = package.digest()
        self.names = opened.classes
        self.budget_left = opened.budget_left
        self._keys = SessionKeys(key, package=self.digest, session=opened.session)
        self._free = deque(range(UNDER_WAY))
        self._next = [0] * UNDER_WAY
        self._process = os.getpid()

    def acquire(self) -> int:
        """A lane, until `release`. Raises AccessError `session.busy` when all are taken."""
        try:
            return self._free.popleft()
        except IndexError:
            raise AccessError(
                "session.busy", f"{UNDER_WAY} requests are under way", step="ask", fix="Wait until one is answered."
            ) from None

    def release(self, lane: int) -> None:
        """Give a lane back, whatever became of its request."""
        self._free.append(lane)

    def seal(self, lane: int, rows: NDArray[np.generic]) -> Asked:
        """Seal records (N, C, H, W) as the next request of an acquired lane.

        Raises ProtocolError `session.other-process` in a fork: both processes would seal under the same numbers.
        """
        if os.getpid() != self._process:
            raise ProtocolError(
                "session.other-process",
                "the session was opened before this process was forked",
                step="ask",
                fix="Connect in each process that asks.",
            )
        number = self._next[lane]
        self._next[lane] = number + 1  # first: whatever happens now, no number seals twice
        raw = np.ascontiguousarray(rows).tobytes()
        return Asked(self._keys.seal_request(lane, number, raw), lane, number, len(rows))

    def open(self, asked: Asked, sealed: bytes) -> Part:
        """The answer to a request.

        Raises ProtocolError `answer.foreign`, `answer.size`, `answer.not-probabilities`, IntegrityError.
        """
        answer = self._keys.open_answer(sealed, asked.lane, asked.number)
        probabilities = _checked(answer, asked.rows, self.package)
        self.budget_left = answer.budget_left
        return Part(probabilities, answer.audited, answer.wrong, answer.budget_left)


class Opened:
    """What a client knows of the session that it has."""

    _session: Session

    @property
    def package(self) -> Package:
        """The verified package that is served now."""
        return self._session.package

    @property
    def claims(self) -> Claims:
        """What the enclave's evidence says."""
        return self._session.claims

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the probabilities' columns."""
        return self._session.names

    @property
    def budget_left(self) -> int:
        """Records that the user may still ask about, as of the last answer."""
        return self._session.budget_left


def check_records(package: Package, records: NDArray[np.generic]) -> None:
    """Raise DataError `ask.shape` or `ask.not-finite` for what the model does not take."""
    data = package.data
    if records.shape[1:] != data.shape or records.dtype != data.numpy_dtype or not len(records):
        raise DataError(
            "ask.shape",
            f"inputs of {records.shape} {records.dtype}, the model takes (N, {', '.join(map(str, data.shape))}) "
            f"{data.numpy_dtype}",
            step="ask",
            fix="Convert the inputs to the model's shape and element type; at least one.",
        )
    if (
        data.dtype == "f32"  # equivalent: bytes are always finite; this saves a pass over them
        and not np.isfinite(records).all()
    ):
        raise DataError(
            "ask.not-finite", "an input holds NaN or infinity", step="ask", fix="Leave that record out, or repair it."
        )


def join(session: Session, parts: Sequence[Part]) -> Prediction:
    """The answers to the requests of one question, in order."""
    probabilities = np.concatenate([part.probabilities for part in parts])
    indices = probabilities.argmax(1).astype(np.int64)
    return Prediction(
        probabilities=probabilities,
        classes=[session.names[index] for index in indices],
        indices=indices,
        names=session.names,
        audited=all(part.audited for part in parts),
        center_wrong=max(part.wrong for part in parts),
        budget_left=parts[-1].budget_left,
        package=session.digest,
        model=session.package.model,
    )


def _checked(answer: Answer, rows: int, package: Package) -> Probabilities:
    expected = rows * package.classes * 4
    if len(answer.probabilities) != expected:
        raise _bad("answer.size", f"{len(answer.probabilities)} bytes of probabilities, {expected} are due")
    found = np.frombuffer(answer.probabilities, "<f4").reshape(rows, package.classes)
    # Written so that NaN fails. Where only the greatest are answered, the others are missing from the sum.
    sums = found.sum(1, dtype=np.float64)
    short = package.terms.top is not None or bool((sums >= 1 - _TOLERANCE).all())
    if not (short and bool((found >= 0).all()) and bool((sums <= 1 + _TOLERANCE).all())):
        raise _bad("answer.not-probabilities", "the numbers are no probabilities")
    return found.astype(np.float32)


def _bad(code: str, what: str) -> ProtocolError:
    return ProtocolError(
        code,
        f"the enclave's answer was refused: {what}",
        step=_STEP,
        fix="Ask again; if it repeats, report it to the model's owner.",
    )


def _mismatch(what: str) -> IntegrityError:
    return IntegrityError(
        "session.mismatch",
        f"the session was refused: {what}",
        step="open session",
        fix="Refuse this enclave, and report it to the model's owner.",
    )
