"""The quality of contributors over the runs that a party holds: each hunt's estimates, verified once more.

The order is that in which this party countersigned the runs, by its own journal: the chain has no clock that could be
trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec

from caltrain.crypto.digests import same
from caltrain.crypto.dsse import open_envelope
from caltrain.errors import IntegrityError
from caltrain.exposure.figures import Estimate
from caltrain.files import read_bounded
from caltrain.participant.evidence import FinishedRun, read_run
from caltrain.participant.heads import known_run
from caltrain.participant.hunt import kept_report
from caltrain.participant.identity import Identity
from caltrain.participant.journal import KeptRun, kept_runs
from caltrain.participant.receive import MAX_CHAIN_BYTES, SUSPICION, read_chain
from caltrain.plan import Plan, RunManifest
from caltrain.provenance.chain import Event, verify_chain
from caltrain.provenance.statements import LinkedModel

_STEP = "read quality over time"
Change = Literal["plan", "quarantine", "records"]
"""What is not as in the run before: anything of the plan but its repair; what the repair leaves out; sealed shards."""


@dataclass(frozen=True)
class HuntedRun:
    """A verified run of a party and what its hunt estimated: shares of wrong labels, by contributor.

    `changed` says what is not as in the run before.
    """

    plan: Plan
    manifest: RunManifest
    linked: LinkedModel
    wrong_labels: dict[str, Estimate]
    changed: tuple[Change, ...] = ()


@dataclass(frozen=True)
class History:
    """A party's runs in their order, and the names of folders that hold no report of a hunt."""

    party: str
    runs: tuple[HuntedRun, ...]
    without: tuple[str, ...] = ()

    @property
    def contributors(self) -> tuple[str, ...]:
        """All that took part in one of these runs, in the order of the plans, told of or not."""
        return tuple(dict.fromkeys(party.name for run in self.runs for party in run.manifest.parties))


def history_of(identity: Identity, folders: Sequence[Path] = ()) -> History:
    """Of the runs in these folders, or of all runs in the party's own folder; each verified, or nothing is told.

    Raises ConfigError, IntegrityError or LineageError for the first folder that is not a run that this party
    countersigned, with the statements, the chain and the report of that run (see `hunted_run`). In the party's own
    folder, runs that were never received, or without a report, are named instead.
    """
    without: list[Path] = []
    if not folders:
        folders = sorted(path for path in (identity.folder / "runs").glob("*") if path.is_dir())
        without = [path for path in folders if not all((path / name).is_file() for name in ("run.json", SUSPICION))]
    found = {run.linked.run: run for run in (hunted_run(identity, path) for path in folders if path not in without)}
    ordered = [found[run] for run in kept_runs(identity.folder) if run in found]
    return History(identity.name, tuple(_compared(ordered)), tuple(path.name for path in without))


def hunted_run(identity: Identity, folder: Path) -> HuntedRun:
    """A run of this party and its hunt, from a folder as `caltrain party join` writes it.

    Raises what `read_run` does, LineageError `run.unknown`, `hunt.none-kept` or `chain.broken`, IntegrityError
    `quality.other-manifest`, `quality.other-model`, `quality.not-a-share`, or for what the run's enclave neither signed
    nor sealed to this party.
    """
    finished = read_run(folder)
    manifest = finished.manifest
    kept = known_run(identity, manifest.run)
    if not same(manifest.digest(), kept.manifest):
        raise _refused(
            "quality.other-manifest",
            f"{folder} holds the manifest {manifest.digest()}, {identity.name} countersigned {kept.manifest}",
        )
    key = manifest.enclave_signing_key
    linked = open_envelope(finished.record.linked, "linked-model", key, LinkedModel, step=_STEP)
    if (linked.run, linked.model, linked.repair) != (manifest.run, finished.model, finished.plan.repair or None):
        raise _refused("quality.other-model", f"the link in {folder} is not of the run's model and repair")
    hunted = {event.body.get("model") for event in _chain(folder, finished, kept) if event.kind == "hunt"}
    report = kept_report(identity, manifest.run, folder=folder)
    if finished.model not in hunted or report.model != finished.model:
        raise _refused("quality.other-model", f"chain and report in {folder} do not tell of a hunt of the run's model")
    known = {party.name for party in manifest.parties}
    for party, share in report.wrong_labels.items():
        if party not in known or not 0 <= share.low <= share.value <= share.high <= 1:
            raise _refused("quality.not-a-share", f"the report in {folder} says of {party} what is no share: {share}")
    return HuntedRun(finished.plan, manifest, linked, report.wrong_labels)


def _chain(folder: Path, finished: FinishedRun, kept: KeptRun) -> tuple[Event, ...]:
    chain = read_chain(read_bounded(folder / "chain.jsonl", limit=MAX_CHAIN_BYTES))
    # The party may have followed the run further than what it keeps beside the model.
    head = kept.head if kept.events <= len(chain) else finished.record.head
    manifest = finished.manifest
    return verify_chain(chain, run=manifest.run, signing_key=manifest.enclave_signing_key, head=head)


def _compared(runs: Sequence[HuntedRun]) -> list[HuntedRun]:
    later = [replace(run, changed=_changes(before, run)) for before, run in pairwise(runs)]
    return [*runs[:1], *later]


def _changes(before: HuntedRun, after: HuntedRun) -> tuple[Change, ...]:
    former, present = ({p.name: p.shards for p in run.manifest.parties} for run in (before, after))
    changed: dict[Change, bool] = {
        "plan": _unrepaired(before.plan) != _unrepaired(after.plan),
        "quarantine": _left_out(before.plan) != _left_out(after.plan),
        "records": any(former[name] != present[name] for name in former.keys() & present.keys()),
    }
    return tuple(what for what, is_so in changed.items() if is_so)


def _unrepaired(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, repair=msgspec.UNSET)


def _left_out(plan: Plan) -> tuple[object, ...]:
    return (plan.repair.quarantine, plan.repair.without) if plan.repair else ()


def _refused(code: str, what: str) -> IntegrityError:
    return IntegrityError(
        code,
        what,
        step=_STEP,
        fix="Draw nothing from it: the folder was changed after the run, or is another's. Restore it from a copy.",
    )
