"""Records that evidence against a model names, of one run: plain lists, and what its enclave signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from caltrain.auditor.bundle import MAX_BUNDLE_BYTES, TraceBundle
from caltrain.boundary.sealed import TraceStatement
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.errors import UNDECODABLE, ConfigError, LineageError
from caltrain.files import read_bounded
from caltrain.participant.receive import RunRecord
from caltrain.plan import MAX_PLAN_BYTES, Plan, RunManifest, plan_from_json
from caltrain.provenance.verdict import VerdictStatement
from caltrain.records.quarantine import Quarantine, Quarantined

_STEP = "read evidence"
_MAX_RUN_BYTES = 64 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class FinishedRun:
    """A run as a party keeps it: whose word counts in it, and which model came of it."""

    plan: Plan
    record: RunRecord

    @property
    def manifest(self) -> RunManifest:
        """What all parties countersigned."""
        return self.record.manifest

    @property
    def model(self) -> str:
        """Digest of the model."""
        return self.record.model


def read_run(folder: Path) -> FinishedRun:
    """A party's run folder. Raises ConfigError `remedy.no-run`, `file.unreadable`, or what the plan is refused for."""
    plan = plan_from_json(read_bounded(folder / "plan.json", limit=MAX_PLAN_BYTES))
    try:
        record = json_decoder(RunRecord).decode(read_bounded(folder / "run.json", limit=_MAX_RUN_BYTES))
    except UNDECODABLE as error:
        raise _unusable("remedy.no-run", f"{folder / 'run.json'} was refused: {str(error)[:300]}") from None
    if record.manifest.plan != plan.digest():
        raise _unusable("remedy.no-run", f"{folder} holds another plan than that of its run")
    return FinishedRun(plan, record)


def named_by(path: Path, run: FinishedRun) -> tuple[Quarantined, ...]:
    """The records that a file names: JSON of {record, commitment}, a quarantine list, a signed statement or several, or
    a trace bundle.

    Raises ConfigError `remedy.unreadable`, LineageError `remedy.other-model`, IntegrityError for what the run's enclave
    did not sign.
    """
    raw = read_bounded(path, limit=MAX_BUNDLE_BYTES)
    for form, read in _FORMS:
        try:
            value = json_decoder(form).decode(raw)
        except msgspec.ValidationError:
            continue
        except UNDECODABLE as error:
            raise _unusable("remedy.unreadable", f"{path} is not JSON: {str(error)[:300]}") from None
        return read(value, run)
    raise _unusable("remedy.unreadable", f"{path} holds neither records, nor what an enclave signed about some")


def _listed(entries: tuple[Quarantined, ...], _run: FinishedRun) -> tuple[Quarantined, ...]:
    return entries


def _quarantine(quarantine: Quarantine, run: FinishedRun) -> tuple[Quarantined, ...]:
    _same_model(quarantine.run, quarantine.model, run)
    return quarantine.entries


def _bundle(bundle: TraceBundle, run: FinishedRun) -> tuple[Quarantined, ...]:
    return _signed(bundle.trace, run)


def _several(envelopes: tuple[Envelope, ...], run: FinishedRun) -> tuple[Quarantined, ...]:
    return tuple(entry for envelope in envelopes for entry in _signed(envelope, run))


def _signed(envelope: Envelope, run: FinishedRun) -> tuple[Quarantined, ...]:
    """What the run's enclave signed and names records in."""
    kind = envelope.payload_type.removeprefix("application/vnd.caltrain.").removesuffix(".v1+json")
    if kind not in _SIGNED:
        raise _unusable("remedy.unreadable", f"a statement of the kind {kind[:80]!r} names no records to leave out")
    said = open_envelope(envelope, kind, run.manifest.enclave_signing_key, _SIGNED[kind], step=_STEP)
    _same_model(said.run, said.model, run)
    return tuple(Quarantined(record, commitment) for record, commitment in said.records().items())


_SIGNED: dict[str, type[TraceStatement] | type[VerdictStatement]] = {
    "trace": TraceStatement,
    "verdict": VerdictStatement,
}
_FORMS: tuple[tuple[Any, Callable[[Any, FinishedRun], tuple[Quarantined, ...]]], ...] = (
    (tuple[Quarantined, ...], _listed),
    (Quarantine, _quarantine),
    (Envelope, _signed),
    (tuple[Envelope, ...], _several),
    (TraceBundle, _bundle),
)


def _same_model(run: str, model: str, due: FinishedRun) -> None:
    if (run, model) != (due.manifest.run, due.model):
        raise LineageError(
            "remedy.other-model",
            f"it speaks of model {model} of run {run}, not of {due.model}",
            step=_STEP,
            fix="Give what was found out about the model of this run.",
        )


def _unusable(code: str, what: str) -> ConfigError:
    return ConfigError(
        code,
        what,
        step=_STEP,
        fix='Give the run\'s folder, and JSON of [{"record": {"party", "shard", "leaf"}, "commitment"}], signed traces '
        "or bundles.",
    )
