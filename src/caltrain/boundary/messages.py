"""Every message that may cross the door, as typed records (msgpack).

Requests come from the host and are answered by one reply or a `Failed`. While it works on a request the enclave may
call the host: to read or write bytes that the host stores for it, to report progress, or (with tensor frames, see
`channel`) to run the CenterNet. Nothing else is ever decoded.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec.msgpack import Decoder

from caltrain.attestation.evidence import EvidenceBundle, Nonce, Purpose
from caltrain.crypto.dsse import Envelope
from caltrain.models.spec import MAX_WHEEL_BYTES, Cut
from caltrain.plan import MAX_PARTIES, MAX_PLAN_BYTES, MAX_SHARDS
from caltrain.records.commitment import PartyName, ShardId

MAX_CHUNK = 4 << 20
"""Most bytes that one read or write moves."""

ObjectName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9./-]{0,199}\Z")]
Chunk = Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNK)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """Base of all messages."""


# --- requests: host to enclave ---------------------------------------------------------------------------------------


class Boot(Message, frozen=True, tag="boot"):
    """First message: what the launcher gives. With simulated evidence, the development root's secret.

    `wheel` holds the stages of the model, if it has any: it is measured before any message is read.
    """

    kind: Annotated[str, msgspec.Meta(max_length=40)]
    root_secret: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    wheel: Annotated[bytes, msgspec.Meta(max_length=MAX_WHEEL_BYTES)] = b""
    role: Literal["training", "serving"] = "training"


class Configure(Message, frozen=True, tag="configure"):
    """The plan and every party's approval of it."""

    plan: Annotated[bytes, msgspec.Meta(max_length=MAX_PLAN_BYTES)]
    approvals: Annotated[dict[PartyName, Envelope], msgspec.Meta(max_length=MAX_PARTIES)]


class Attest(Message, frozen=True, tag="attest"):
    """Ask for evidence."""

    purpose: Purpose
    nonce: Nonce


class Provision(Message, frozen=True, tag="provision"):
    """A party's sealed data key, entropy and shard list, in its signed envelope."""

    party: PartyName
    envelope: Envelope


class MakeManifest(Message, frozen=True, tag="make-manifest"):
    """All parties are in: sign the run manifest."""


class Countersign(Message, frozen=True, tag="countersign"):
    """A party's second approval."""

    party: PartyName
    envelope: Envelope


class StoredShard(Message, frozen=True, tag="stored-shard"):
    """A shard that the host has, by contributor and id."""

    party: PartyName
    shard: ShardId


class Ingest(Message, frozen=True, tag="ingest"):
    """Take in the manifest's shards out of what the host has."""

    stored: Annotated[tuple[StoredShard, ...], msgspec.Meta(max_length=MAX_PARTIES * MAX_SHARDS)]


class Train(Message, frozen=True, tag="train"):
    """Go on from this step to the next checkpoint, calling the host's center for every step."""

    epoch: Annotated[int, msgspec.Meta(ge=0)]
    step: Annotated[int, msgspec.Meta(ge=0)] = 0


class Assess(Message, frozen=True, tag="assess"):
    """Before an epoch: measure the model of this moment, and give it to the parties if they are to vote."""


class Vote(Message, frozen=True, tag="vote"):
    """A party's signed word on the cut of the coming epoch."""

    party: PartyName
    envelope: Envelope


class MoveCut(Message, frozen=True, tag="move-cut"):
    """Between epochs: a FrontNet of so many layers. A shallower one needs every party's signed `move-cut`."""

    front: Cut
    approvals: Annotated[dict[PartyName, Envelope], msgspec.Meta(max_length=MAX_PARTIES)] = {}


class Resume(Message, frozen=True, tag="resume"):
    """Instead of `Configure`: take up a run from the checkpoint that the host keeps under this name."""

    plan: Annotated[bytes, msgspec.Meta(max_length=MAX_PLAN_BYTES)]
    checkpoint: ObjectName


class Rejoin(Message, frozen=True, tag="rejoin"):
    """A party's word that the run may be taken up, with its sealed key."""

    party: PartyName
    envelope: Envelope


class Hunt(Message, frozen=True, tag="hunt"):
    """Join the zones, pass all records, seal to each party what is suspicious of its own."""


class Release(Message, frozen=True, tag="release"):
    """Seal FrontNet and HeadNet to the parties."""


class Link(Message, frozen=True, tag="link"):
    """Link the released model to every record."""


class Query(Message, frozen=True, tag="query"):
    """A model user's sealed question, in their signed envelope."""

    user: PartyName
    envelope: Envelope


class RecordDisclosure(Message, frozen=True, tag="record-disclosure"):
    """A party's signed note that it disclosed a record: it becomes an event."""

    party: PartyName
    envelope: Envelope


class Stop(Message, frozen=True, tag="stop"):
    """End the enclave."""


Request = (
    Boot
    | Configure
    | Attest
    | Provision
    | MakeManifest
    | Countersign
    | Ingest
    | Train
    | Assess
    | Vote
    | MoveCut
    | Resume
    | Rejoin
    | Hunt
    | Release
    | Link
    | Query
    | RecordDisclosure
    | Stop
)

# --- replies: enclave to host ----------------------------------------------------------------------------------------


class Ready(Message, frozen=True, tag="ready"):
    """Answer to `Boot`: what the program is, and which measures of its sandbox hold (`name` to `on`, `off`, ...)."""

    measurement: str
    simulated: bool
    sandbox: dict[str, str]


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model of this moment on the held-out records: mean loss, share of right first and first-two answers."""

    records: int
    loss: float
    top1: float
    top2: float


class Done(Message, frozen=True, tag="done"):
    """Success: the events that the request added, and what it answers.

    `at` is where training goes on (epoch, step), `front` the layers of the FrontNet there; `due` those that it must
    have there at least, by the plan's policy and the parties' votes: 0 where no cut is acceptable.
    """

    events: tuple[Envelope, ...] = ()
    bundle: EvidenceBundle | None = None
    signed: Envelope | None = None
    sealed: dict[str, bytes] = {}
    ignored: tuple[StoredShard, ...] = ()
    loss: float | None = None
    held_out: Measured | None = None
    state: str = ""
    at: tuple[int, int] | None = None
    front: int = 0
    due: int | None = None
    center_seed: bytes = b""


class Failed(Message, frozen=True, tag="failed"):
    """A named error; `fatal` means that the run cannot go on, and `events` then say so in the chain."""

    error: dict[str, str]
    fatal: bool
    events: tuple[Envelope, ...] = ()


Reply = Ready | Done | Failed

# --- calls: enclave to host, while a request runs --------------------------------------------------------------------


class Read(Message, frozen=True, tag="read"):
    """Give `length` bytes of a stored object from `offset`; fewer only at its end."""

    name: ObjectName
    offset: Annotated[int, msgspec.Meta(ge=0)]
    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK)]


class Write(Message, frozen=True, tag="write"):
    """Store these bytes at `offset` of an object, which grows as needed.

    With `durable`, answer when all that was written to it would outlast a power failure.
    """

    name: ObjectName
    offset: Annotated[int, msgspec.Meta(ge=0)]
    data: Chunk
    durable: bool = False


class CommitCenter(Message, frozen=True, tag="commit-center"):
    """Commit to the state of the CenterNet before this step: answered with 32 bytes, its digest.

    The host keeps that state until the next but one commitment; with `durable`, for a checkpoint.
    """

    epoch: int
    step: int
    durable: bool = False


class ShowCenter(Message, frozen=True, tag="show-center"):
    """Store the state that was committed to before this step as `center-state`: answered with its length, 8 bytes."""

    epoch: int
    step: int


class Progress(Message, frozen=True, tag="progress"):
    """How far the request is: needs no answer."""

    phase: Annotated[str, msgspec.Meta(max_length=40)]
    done: int
    total: int
    loss: float | None = None


Call = Read | Write | CommitCenter | ShowCenter | Progress

# --- answers: host to enclave, to a call -----------------------------------------------------------------------------


class Data(Message, frozen=True, tag="data"):
    """Bytes of a read, or an empty acknowledgement of a write."""

    data: Chunk = b""


class CallFailed(Message, frozen=True, tag="call-failed"):
    """The host could not do what was called for: a full disk, a missing object, a center that stopped."""

    error: dict[str, str]


Answer = Data | CallFailed

REQUESTS: Decoder[Request] = Decoder(Request)
REPLIES: Decoder[Reply] = Decoder(Reply)
REPLIES_AND_CALLS: Decoder[Reply | Call] = Decoder(Reply | Call)
STORAGE_CALLS: Decoder[Read | Write] = Decoder(Read | Write)
ANSWERS: Decoder[Answer] = Decoder(Answer)
