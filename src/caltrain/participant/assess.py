"""Before an epoch: attack the semi-trained model with one's own records, and vote on the cut.

(1) the run waits for this party's vote, and is the one that this party countersigned
(2) the chain verifies through the newest head that this party has kept; its last `assess` event names a model
(3) the enclave's signed figures, this party's sealed part and the host's CenterNet are of that very model
(4) the attacks that the plan's policy names run on this party's own records (arXiv:1812.03230, IV-B)
(5) only then: the report is signed and kept in the party's folder, and the vote leaves

Of one model there is one report: a host that asks again gets the same word, and cannot ask until it likes the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from caltrain.boundary.sealed import ReleasedPart, open_for
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, envelope_from_json, open_envelope
from caltrain.errors import ConfigError, EnvironmentFault, IntegrityError
from caltrain.exposure.party_report import PartyReport
from caltrain.files import read_bounded
from caltrain.host_client import HostClient
from caltrain.participant.files import write_whole
from caltrain.participant.heads import known_run, look
from caltrain.participant.identity import Identity
from caltrain.participant.join import check_named
from caltrain.participant.receive import join_weights, run_folder
from caltrain.participant.rejoin import same_run
from caltrain.participant.seal import own_records
from caltrain.participant.waiting import glance
from caltrain.plan import ExposureSpec, Plan, possible_cuts
from caltrain.provenance.chain import Event
from caltrain.provenance.statements import AssessedModel, ExposureVote

_STEP = "assess"
_POLL = 0.25
_OVER = {"hunt", "release", "link", "linked"}
Records = tuple[NDArray[np.generic], NDArray[np.int64]]
Judge = Callable[[Plan, ExposureSpec, bytes, tuple[int, ...], Records], PartyReport]


@dataclass(frozen=True)
class Voted:
    """A vote that was given: on which model, for which cut (0: none), and what the party measured."""

    run: str
    epoch: int
    statement: AssessedModel
    report: PartyReport
    front: int


def assess(
    host: HostClient, plan: Plan, identity: Identity, *, judge: Judge, least: int = 0, seconds: float = 86_400
) -> Voted | None:
    """All five steps; None where training is over. `least` is the shallowest cut that this party accepts at all.

    Raises before anything is sent: ConfigError `assess.no-policy`, IntegrityError `assess.other-model`, and as
    `rejoin` does for another run or chain.
    """
    check_named(plan, identity)
    if plan.exposure is None:
        raise ConfigError(
            "assess.no-policy", "the plan has no policy for the cut", step=_STEP, fix="Nothing is to be assessed."
        )
    if not _called(host, identity.name, seconds=seconds):
        return None
    run = same_run(host, plan, identity)
    statement = _statement(host, identity, run, look(host, identity, run))
    if statement.plan != plan.digest():
        raise _other("the enclave's figures are of another plan")
    cuts = possible_cuts(plan, statement.front)
    path = run_folder(identity, run) / f"exposure-{statement.epoch}.json"
    report = _kept(path, identity, statement)
    if report is None:
        weights = _weights(host, plan, identity, statement)
        report = judge(plan, plan.exposure, weights, cuts, own_records(identity, plan.data))
        write_whole(path, msgspec.json.encode(identity.signer.sign("party-report", report)))
    accepted = [cut for cut in cuts if report.front and cut >= max(report.front, least)]
    front = min(accepted, default=0)
    vote = ExposureVote(
        run=run,
        epoch=statement.epoch,
        model=statement.model,
        party=identity.name,
        front=front,
        report=digest("party-report/v1", canonical_json(report)),
    )
    host.post(f"/v1/parties/{identity.name}/vote", identity.signer.sign("exposure-vote", vote), dict[str, Any])
    return Voted(run, statement.epoch, statement, report, front)


def _called(host: HostClient, party: str, *, seconds: float) -> bool:
    """Wait until the run waits for this party's vote, through deaths of the host; False once training is over."""
    deadline = time.monotonic() + seconds
    while True:
        status, gone = glance(host, lambda _status: None)
        if status is not None and status.phase in _OVER:
            return False
        if status is not None and status.phase == "assess" and party in status.waiting_for:
            return True
        if time.monotonic() > deadline:
            raise gone or EnvironmentFault(
                "host.too-slow",
                f"the run is still in phase {status.phase if status else ''!r:.60}",
                step="wait for an assessment",
                fix="Ask those who are waited for, or wait longer with --timeout.",
            )
        time.sleep(_POLL)


def _statement(host: HostClient, identity: Identity, run: str, events: tuple[Event, ...]) -> AssessedModel:
    """The enclave's figures that the chain's last `assess` event names."""
    raw = host.artifact("semi-trained.json", limit=MAX_ENVELOPE_BYTES)
    key = known_run(identity, run).signing_key
    statement = open_envelope(envelope_from_json(raw, step=_STEP), "assessed-model", key, AssessedModel, step=_STEP)
    named = [event.body.get("statement") for event in events if event.kind == "assess"]
    own = digest("assessed-model/v1", canonical_json(statement))
    if named[-1:] != [own] or statement.run != run:
        raise _other("the enclave's figures are not those that the chain names last")
    return statement


def _kept(path: Path, identity: Identity, statement: AssessedModel) -> PartyReport | None:
    """What this party has found before of that very model, from that cut on."""
    if not path.exists():
        return None
    envelope = envelope_from_json(read_bounded(path, limit=MAX_ENVELOPE_BYTES), step=_STEP)
    report = open_envelope(envelope, "party-report", identity.signer.public, PartyReport, step=_STEP)
    return report if report.model == statement.model and not 0 < report.front < statement.front else None


def _weights(host: HostClient, plan: Plan, identity: Identity, statement: AssessedModel) -> bytes:
    """The semi-trained model of the statement, as safetensors."""
    sealed = host.artifact(f"semi-trained/{identity.name}")
    part = open_for(identity.data_key, "semi-trained/v1", sealed, ReleasedPart, context=statement.run, step=_STEP)
    if part.model != statement.model:
        raise _other("the part that was sealed to us is of another model")
    return join_weights(plan, part.weights, host.artifact("center"), digest=statement.model)


def _other(what: str) -> IntegrityError:
    return IntegrityError(
        "assess.other-model",
        f"the semi-trained model was refused: {what}",
        step=_STEP,
        fix="Do not vote. Ask the host again; if it stays so, the host mixes up runs or epochs.",
    )
