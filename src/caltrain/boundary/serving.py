"""Messages of a serving enclave. The host sends in any order and without waiting; each is answered once, in order.

    host to enclave                              enclave to host
    LoadPackage, Grant, OpenSession, ...         Served, or Failed
    Infer                                        Admitted; then the IR (tensors, role `ir`), if any request was admitted
    tensors (role `center-out`), or Abandon      Answered

Batches are numbered by the host (`step` of their tensors); the enclave holds at most `MAX_BATCHES` of them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec.msgpack import Decoder

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.boundary.messages import Attest, Boot, Failed, Message, Ready, Stop
from caltrain.crypto.dsse import Envelope
from caltrain.records.commitment import ShardId

MAX_BATCHES = 2
"""As many as the ring has slots: an IR is read before the next but one is written."""
MAX_REQUESTS = 256
MAX_REQUEST_BYTES = 48 << 20
BatchNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Frame = Annotated[bytes, msgspec.Meta(max_length=MAX_REQUEST_BYTES)]


class LoadPackage(Message, frozen=True, tag="load-package"):
    """The package that this enclave is to serve: its signed manifest. Its parts are read from the host's store."""

    package: Envelope


class Grant(Message, frozen=True, tag="grant"):
    """The owner's sealed package key, in its signed envelope (sealed kind `grant`)."""

    envelope: Envelope


class OpenSession(Message, frozen=True, tag="open-session"):
    """A user's sealed session key, in their signed envelope; a credential where the package does not name them."""

    envelope: Envelope
    credential: Envelope | None = None


class CloseSession(Message, frozen=True, tag="close-session"):
    """Forget a session."""

    session: ShardId


class Infer(Message, frozen=True, tag="infer"):
    """Requests to be computed together, as users sealed them."""

    batch: BatchNumber
    requests: Annotated[tuple[Frame, ...], msgspec.Meta(min_length=1, max_length=MAX_REQUESTS)]


class Abandon(Message, frozen=True, tag="abandon"):
    """The center cannot compute this batch: answered by `Answered` without answers."""

    batch: BatchNumber


ServingRequest = Boot | LoadPackage | Attest | Grant | OpenSession | CloseSession | Infer | Abandon | Stop


class Served(Message, frozen=True, tag="served"):
    """Success of anything but a batch. `session` and `sealed` answer `OpenSession`, `signed` answers `Grant`."""

    bundle: EvidenceBundle | None = None
    signed: Envelope | None = None
    session: str = ""
    sealed: bytes = b""


class Admitted(Message, frozen=True, tag="admitted"):
    """Which requests of a batch were refused, by their place, and why; `rows` records of the others are under way."""

    batch: BatchNumber
    refused: dict[int, dict[str, str]] = msgspec.field(default_factory=dict)
    rows: int = 0


class Answered(Message, frozen=True, tag="answered"):
    """Sealed answers to the admitted requests, by place; or the one error that all of them get."""

    batch: BatchNumber
    answers: dict[int, bytes] = msgspec.field(default_factory=dict)
    error: dict[str, str] | None = None


ServingReply = Ready | Served | Failed | Admitted | Answered
SERVING_REQUESTS: Decoder[ServingRequest] = Decoder(ServingRequest)
SERVING_REPLIES: Decoder[ServingReply] = Decoder(ServingReply)
