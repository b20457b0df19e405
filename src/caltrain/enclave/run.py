"""The state of one run inside the enclave, and what every handler is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from torch import Tensor, nn

from caltrain.enclave.door import Door
from caltrain.enclave.pool import Pool
from caltrain.enclave.vault import Vault
from caltrain.errors import ProtocolError
from caltrain.plan import Plan, RunManifest
from caltrain.provenance.chain import Chain, EventKind
from caltrain.records.commitment import RecordRef
from caltrain.training.seeds import RunSeeds
from caltrain.training.zone import Zone

T = TypeVar("T")


class State(StrEnum):
    """Where the run is. It only moves forward."""

    NEW = "new"
    ENROLLING = "enrolling"
    AGREEING = "agreeing"
    AGREED = "agreed"
    READY = "ready"
    TRAINED = "trained"
    RELEASED = "released"
    LINKED = "linked"
    STOPPED = "stopped"


@dataclass
class Linkage:
    """(F, Y, S, H) of every record: fingerprints (N, D), labels (N,), where each is, its commitment."""

    fingerprints: Tensor
    labels: Tensor
    records: list[RecordRef]
    commitments: list[bytes]


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
    pool: Pool | None = None
    front: Zone | None = None
    head: Zone | None = None
    epoch: int = 0
    center_commitment: bytes = b""
    model: nn.Sequential | None = None
    model_digest: str = ""
    linkage: Linkage | None = None
    spent: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[EventKind, dict[str, object]]] = field(default_factory=list)

    def record(self, kind: EventKind, body: dict[str, object]) -> None:
        """Note an event; the session signs it into the chain once the request has succeeded."""
        self.pending.append((kind, body))

    @property
    def seeds(self) -> RunSeeds:
        """Sub-seeds of the run."""
        return RunSeeds.from_run_seed(self.seed)


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
