"""A user's session with a serving enclave: one HPKE-sealed key, then numbered AEAD frames.

A request is `version (1) | session (16) | lane (1) | number (8) | ciphertext`, an answer `version (1) | lane (1) |
number (8) | ciphertext`. Lanes let one session have several requests on their way; in a lane numbers only rise, so
the enclave answers no frame twice and none out of its order. Lane and number are the nonce, each direction has its own
key, and the package, the session and the direction are authenticated with every frame.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.boundary.sealed import Key
from caltrain.crypto.aead import TAG_BYTES, FrameCipher
from caltrain.crypto.dsse import Envelope
from caltrain.crypto.kdf import derive
from caltrain.errors import ProtocolError
from caltrain.records.commitment import ShardId
from caltrain.records.schema import Name

LANES = 256
LAST = 1 << 48
"""Numbers of a lane are below this."""
_VERSION = 1
_REQUEST = struct.Struct(">B16sBQ")
_ANSWER = struct.Struct(">BBQ")
_PLAIN = struct.Struct("<BIQ")
_MAX_COUNT = (1 << 32) - 1
REQUEST_OVERHEAD = _REQUEST.size + TAG_BYTES


class Offer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a host answers to a nonce: the package that it serves, and evidence of the enclave that serves it."""

    package: Envelope
    bundle: EvidenceBundle


class SessionSecret(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a user seals to a verified serving enclave (sealed kind `session`)."""

    key: Key


class SessionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What opens a session: the sealed, signed secret; a credential where the package does not name the user."""

    envelope: Envelope
    credential: Envelope | None = None


class SessionOpened(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What comes back, sealed under the session's key for `session-opened/v1` and the transcript."""

    session: ShardId
    classes: Annotated[tuple[Name, ...], msgspec.Meta(min_length=2, max_length=10_000)]
    budget_left: int
    simulated: bool


class RequestHead(msgspec.Struct, frozen=True):
    """Where a request belongs: readable by the host, authenticated by the enclave."""

    session: str
    lane: int
    number: int


class Answer(msgspec.Struct, frozen=True):
    """An opened answer. `probabilities` is float32, little endian, rows x classes.

    `audited`: the enclave computed the center's part of this batch itself and got the same. `wrong`: how often it has
    got something else since it began to serve; the host can withhold those answers, not the count in all later ones.
    """

    audited: bool
    wrong: int
    budget_left: int
    probabilities: bytes


class SessionKeys:
    """Both ends' ciphers of one session."""

    def __init__(self, key: bytes, *, package: str, session: str) -> None:
        context = f"{package}\0{session}".encode()
        self._id = bytes.fromhex(session)
        self._requests = FrameCipher(
            derive(key, "serving-request/v1"), context=b"caltrain:serving-request/v1\0" + context
        )
        self._answers = FrameCipher(derive(key, "serving-answer/v1"), context=b"caltrain:serving-answer/v1\0" + context)

    def seal_request(self, lane: int, number: int, rows: bytes | memoryview) -> bytes:
        """A request of records, `number` in its `lane`. Each pair serves once."""
        return _REQUEST.pack(_VERSION, self._id, lane, number) + self._requests.seal(_index(lane, number), rows)

    def open_request(self, frame: bytes, head: RequestHead) -> bytes:
        """The records of a request whose head was read. Raises IntegrityError."""
        sealed = memoryview(frame)[_REQUEST.size :]
        return self._requests.unseal(_index(head.lane, head.number), sealed, step="open request")

    def seal_answer(self, head: RequestHead, answer: Answer) -> bytes:
        """The answer to the request with that head."""
        plain = _PLAIN.pack(answer.audited, min(answer.wrong, _MAX_COUNT), answer.budget_left) + answer.probabilities
        return _ANSWER.pack(_VERSION, head.lane, head.number) + self._answers.seal(
            _index(head.lane, head.number), plain
        )

    def open_answer(self, frame: bytes, lane: int, number: int) -> Answer:
        """The answer that is due to that request. Raises ProtocolError `answer.foreign`, IntegrityError."""
        if len(frame) < _ANSWER.size + TAG_BYTES + _PLAIN.size or _ANSWER.unpack_from(frame) != (
            _VERSION,
            lane,
            number,
        ):
            raise ProtocolError(
                "answer.foreign",
                "the host returned the answer to another request, or none",
                step="open answer",
                fix="Ask again; if it repeats, the host misbehaves: report it.",
            )
        plain = self._answers.unseal(_index(lane, number), memoryview(frame)[_ANSWER.size :], step="open answer")
        audited, wrong, left = _PLAIN.unpack_from(plain)
        return Answer(bool(audited), wrong, left, plain[_PLAIN.size :])


def read_head(frame: bytes) -> RequestHead:
    """The head of a request frame. Raises ProtocolError `request.malformed`."""
    if len(frame) < REQUEST_OVERHEAD or frame[0] != _VERSION:
        raise _malformed(f"{len(frame)} bytes that are no sealed request of version {_VERSION}")
    _, session, lane, number = _REQUEST.unpack_from(frame)
    if number >= LAST:
        raise _malformed("its number is too large")
    return RequestHead(session.hex(), lane, number)


def _index(lane: int, number: int) -> int:
    return lane << 64 | number


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(
        "request.malformed",
        f"a request was refused: {what}",
        step="read request",
        fix="Seal requests with the caltrain client, or through `caltrain proxy`.",
    )
