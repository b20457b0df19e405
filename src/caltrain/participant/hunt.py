"""What the hunt found of our own records: fetched before the model is released, or as it was kept with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from caltrain.boundary.sealed import Scan, SuspicionReport, open_for
from caltrain.errors import LineageError
from caltrain.files import read_bounded
from caltrain.host_client import HostClient
from caltrain.participant.evidence import read_run
from caltrain.participant.heads import check_ours, known_run, shown_manifest
from caltrain.participant.identity import Identity
from caltrain.participant.receive import SUSPICION, run_folder
from caltrain.plan import Plan

_STEP = "read hunt"
_HUNTED = {"release", "link", "linked"}
_MAX_REPORT = 1 << 30


class Suspicious(NamedTuple):
    """A record of ours and its score by one scan, 0 to 1."""

    shard: str
    leaf: int
    score: float


def fetch_report(host: HostClient, identity: Identity, *, seconds: float) -> tuple[str, SuspicionReport]:
    """The run, and its report, as soon as the host has it: before the parties receive the model.

    Nobody but the enclave and this party can have sealed it. Raises LineageError `run.unknown` for a run that this
    party did not countersign, IntegrityError for another's report, and the run's error.
    """
    host.wait_for(_HUNTED, seconds=seconds)
    run = shown_manifest(host, step=_STEP).run
    known_run(identity, run)
    sealed = host.artifact(f"suspicion/{identity.name}")
    return run, _opened(identity, run, sealed)


def kept_report(identity: Identity, run: str, *, folder: Path | None = None) -> SuspicionReport:
    """The report that was kept with the run's model, in the party's own folder of the run unless another is named.

    It is kept as it was sealed: nobody but the enclave of this run and this party can have made it. Raises LineageError
    `hunt.none-kept` where there is none, IntegrityError for one that was changed, or is of another run or party.
    """
    path = (folder or run_folder(identity, run)) / SUSPICION
    if not path.is_file():
        raise LineageError(
            "hunt.none-kept",
            f"there is no report of a hunt in {path.parent}",
            step=_STEP,
            fix="Name a run whose model this party has received (`caltrain party join`), or ask the host with --url.",
        )
    return _opened(identity, run, read_bounded(path, limit=_MAX_REPORT))


def fetch_plan(host: HostClient, identity: Identity) -> Plan:
    """The plan of the host's run, which this party countersigned.

    Raises LineageError `run.unknown`, IntegrityError `rejoin.other-manifest`.
    """
    plan = host.get("/v1/plan", Plan)
    check_ours(shown_manifest(host, step=_STEP), plan, identity)
    return plan


def kept_plan(identity: Identity, run: str) -> Plan:
    """The plan that was kept with the run's model. Raises ConfigError."""
    return read_run(run_folder(identity, run)).plan


def _opened(identity: Identity, run: str, sealed: bytes) -> SuspicionReport:
    return open_for(identity.data_key, "suspicion/v1", sealed, SuspicionReport, context=run, step=_STEP)


def most_suspicious(report: SuspicionReport, scan: Scan, *, top: int) -> list[Suspicious]:
    """Of all our shards the `top` records with the highest scores, highest first."""
    found = [
        Suspicious(shard, leaf, score / 1000)
        for shard in report.scores[scan]
        for leaf, score in enumerate(report.of(shard, scan=scan))
        if score is not None
    ]
    return sorted(found, key=lambda s: -s.score)[:top]
