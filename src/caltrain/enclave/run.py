"""The state of one run inside the enclave, and what every handler is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from caltrain.accountability.reference import Reference
from caltrain.enclave.audit import Audit
from caltrain.enclave.door import Door
from caltrain.enclave.linkage import LinkageStore
from caltrain.enclave.pool import Pool
from caltrain.enclave.vault import Vault
from caltrain.errors import ProtocolError
from caltrain.models.network import Network
from caltrain.models.spec import Partition
from caltrain.models.wheel import Factory, no_wheel
from caltrain.plan import Plan, RunManifest
from caltrain.provenance.chain import Chain, EventKind
from caltrain.training.seeds import RunSeeds
from caltrain.training.zone import Zone

if TYPE_CHECKING:  # what a run keeps may itself be made from a run
    from caltrain.enclave.contents import Contents, Passed
    from caltrain.enclave.evidence import Evidence
    from caltrain.enclave.opinion import Outputs

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]


class State(StrEnum):
    """Where the run is. It only moves forward."""

    NEW = "new"
    ENROLLING = "enrolling"
    RESUMING = "resuming"
    AGREEING = "agreeing"
    AGREED = "agreed"
    READY = "ready"
    ASSESSING = "assessing"
    TRAINED = "trained"
    HUNTED = "hunted"
    RELEASED = "released"
    LINKED = "linked"
    STOPPED = "stopped"


@dataclass
class Course:
    """How far training has come: the next step is `step` of `epoch`, with a FrontNet of `front` layers.

    `loss` sums over the steps of this epoch so far; `best` is the lowest loss on the held-out records, `since` the
    epochs since then.
    """

    front: int
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    best: float = float("inf")
    since: int = 0
    center: bytes = b""
    """Digest of the CenterNet's state before the next step, as far as it is committed to."""


@dataclass
class Assessment:
    """The model before an epoch, by its digest; the least FrontNet that the figures allow, then that of each party.

    0 is none. `cuts` are those that the model could have.
    """

    epoch: int
    model: str
    cuts: tuple[int, ...]
    least: int
    votes: dict[str, int] = field(default_factory=dict)

    @property
    def due(self) -> int:
        """Layers that the FrontNet must have at least; 0 where somebody accepts no cut."""
        said = (self.least, *self.votes.values())
        return max(said) if all(said) else 0


@dataclass
class Custody:
    """What seals the checkpoints: their key, and one share of it for each party, sealed to that party."""

    key: bytes
    shares: dict[str, bytes]
    written: int = 0


@dataclass
class Resuming:
    """Which checkpoint of which run is to be taken up; by party, the head that it signed and its share of the key."""

    run: str
    digest: str
    checkpoint: str
    words: dict[str, tuple[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bucket:
    """How many inputs a user could ask about at a time of the enclave's clock, in seconds."""

    level: float
    at: float


@dataclass
class Run:
    """Everything that a run knows; optional fields fill as it moves on."""

    vault: Vault
    door: Door
    chain: Chain
    state: State = State.NEW
    plan: Plan | None = None
    manifest: RunManifest | None = None
    countersigned: set[str] = field(default_factory=set)
    seed: bytes = b""
    wheel: bytes = b""
    """The wheel that was measured with the program, if any."""
    factory: Factory = no_wheel
    custody: Custody | None = None
    pool: Pool | None = None
    held_out: Pool | None = None
    front: Zone | None = None
    head: Zone | None = None
    course: Course | None = None
    audit: Audit | None = None
    assessment: Assessment | None = None
    batches: Iterator[Batch] | None = None
    model: Network | None = None
    model_digest: str = ""
    passed: Passed | None = None
    """What the pass over all records found: it waits for the link."""
    contents: Contents | None = None
    outputs: Outputs | None = None
    """What second opinions need of every record, where the plan has them and there is room."""
    evidence: Evidence | None = None
    """What verdicts and second opinions start from."""
    linkage: LinkageStore | None = None
    references: dict[int, Reference] = field(default_factory=dict)
    """By class, how far clean queries are from its records."""
    spent: dict[str, int] = field(default_factory=dict)
    buckets: dict[str, Bucket] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    """Seconds. The host can hold the clock of a machine, or speed it: only `spent` is a bound against it."""
    started: float = 0.0
    resuming: Resuming | None = None
    pending: list[tuple[EventKind, dict[str, object]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def record(self, kind: EventKind, body: dict[str, object]) -> None:
        """Note an event; the session signs it into the chain once the request has succeeded."""
        self.pending.append((kind, body))

    def record_once(self, kind: EventKind, body: dict[str, object]) -> None:
        """Note an event, unless the chain holds it: a run that was taken up again does what it did."""
        if not self.chain.holds(kind, body):
            self.record(kind, body)

    @property
    def seeds(self) -> RunSeeds:
        """Sub-seeds of the run."""
        return RunSeeds.from_run_seed(self.seed)

    @property
    def partition(self) -> Partition:
        """The cut as it is now."""
        return present(self.plan).partition.at(present(self.course).front)

    @property
    def audit_rate(self) -> float:
        """The share of the center's steps that is repeated inside: what statements say of it."""
        return present(self.plan).center.audit_rate

    @property
    def resumes(self) -> int:
        """How often another enclave took up the run before the model was released."""
        return self.chain.count("resume", before="release")

    @property
    def records(self) -> int:
        """Records that are trained on."""
        return present(self.manifest).trained(present(self.plan))

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.records // present(self.plan).training.batch


def present(value: T | None) -> T:
    """A field that the state table guarantees. Raises ProtocolError where it does not."""
    if value is None:
        raise ProtocolError(
            "session.not-yet",
            "the run has not come far enough for this",
            step="handle request",
            fix="Send the requests in the order of the protocol.",
        )
    return value
