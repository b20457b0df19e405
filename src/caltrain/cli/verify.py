"""`caltrain verify`: for anybody, offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray

from caltrain.auditor.bundle import MAX_BUNDLE_BYTES, Verified, check_input, judge_bundle, read_bundle
from caltrain.auditor.left_out import check_left_out
from caltrain.auditor.verdict import VerifiedVerdict, check_inputs, judge_verdict
from caltrain.cli.files import read_named, read_policy
from caltrain.cli.output import Format, FormatOption, choose, emit, say, say_simulated
from caltrain.cli.query import OPINION, missing
from caltrain.cli.verdict_text import TOLD, show, summary
from caltrain.crypto.dsse import Envelope
from caltrain.errors import UNDECODABLE, IntegrityError
from caltrain.files import read_bounded
from caltrain.participant.identity import load_identity
from caltrain.plan import Plan
from caltrain.records.commitment import RecordRef
from caltrain.records.quarantine import MAX_QUARANTINE_BYTES
from caltrain.records.shown import Reading
from caltrain.reports.terminal import center_note


def verify(
    bundle: Annotated[Path, typer.Argument(help="a bundle with a trace or a verdict")],
    plan_digest: Annotated[str, typer.Option(help="the digest of the plan, from a party that you trust to know it")],
    policy: Annotated[
        Path | None, typer.Option(help="policy.toml: which enclaves and whose evidence you accept")
    ] = None,
    disclosures: Annotated[list[Path], typer.Option(help="files of disclosures to add")] = [],  # noqa: B006
    home: Annotated[Path | None, typer.Option(help="your folder, to open what is disclosed to you alone")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="what was asked about, to see that trace or verdict is of it")
    ] = None,
    head: Annotated[str, typer.Option(help="a head of the chain that a party kept")] = "",
    quarantine: Annotated[Path | None, typer.Option(help="the list of records that a repair left out")] = None,
    left_out: Annotated[
        list[str], typer.Option(help="with --quarantine: the commitment of a record that must be in it; repeat")
    ] = [],  # noqa: B006
    format_: FormatOption = Format.TEXT,
) -> None:
    """Check a bundle and what its contributors answered, offline: a decision for every record that it names."""
    choose(format_)
    found, reader = read_bundle(bundle), load_identity(home) if home else None
    added = [envelope for path in disclosures for envelope in _disclosures(path)]
    found = msgspec.structs.replace(found, disclosures=(*found.disclosures, *added))
    judge = judge_verdict if found.trace.claims("verdict") else judge_bundle
    verified = judge(
        found,
        plan_digest=plan_digest,
        head=head or None,
        policy=read_policy(policy) if policy else None,
        reading=Reading(reader.name, reader.reading_key()) if reader else None,
    )
    if left_out and quarantine is None:
        raise missing("--left-out needs the list itself: --quarantine FILE")
    if quarantine is not None:
        check_left_out(verified, read_bounded(quarantine, limit=MAX_QUARANTINE_BYTES), commitments=left_out)
    inputs, names = read_named([input_]) if input_ else (None, [])
    if verified.simulated:
        say_simulated()
    if not verified.appraised:
        say("the enclave's evidence was not appraised: give --policy; that it was genuine is the parties' word")
    if isinstance(verified, VerifiedVerdict):
        said = _of_verdict(verified, inputs)
        answered = [decision for decision in verified.decisions if decision.outcome != "undisclosed"]
    else:
        said = _of_trace(verified, inputs, names, found.plan)
        answered = [*verified.decisions]
    if verified.front_public:
        say("training began from public weights: the FrontNet is no secret")
    if verified.repair:
        say(verified.repair.in_words())
    for commitment in left_out:
        say(f"not used: the record with the commitment {commitment}")
    for decision in answered:
        say(f"{decision.rank}. {_place(decision.record)}: {decision.outcome}")
    verified.sound()
    emit(
        said
        | {
            "verified": True,
            "run": verified.run,
            "model": verified.model,
            "outcomes": {_place(decision.record): decision.outcome for decision in answered},
            "disclosed": len(verified.records),
            "undisclosed": sum(decision.outcome == "undisclosed" for decision in verified.decisions),
            "events": verified.events,
            "head": verified.head,
            "simulated": verified.simulated,
            "evidence": "accepted" if verified.appraised else "not appraised",
            "center_audited": verified.center_audited,
            "front_public": verified.front_public,
            "repair": verified.repair,
            "left_out": left_out,
        },
        title="The bundle verifies",
        told={"input", "outcomes", "neighbours", "simulated", "repair", "left_out"}
        | (TOLD if "outcome" in said else set()),
    )


def _of_trace(
    verified: Verified, inputs: NDArray[np.generic] | None, names: Sequence[str], plan: Plan
) -> dict[str, object]:
    """What a trace says, and which of `inputs` it is of."""
    shown = None if inputs is None else check_input(verified, inputs)
    if shown is not None:
        say(f"the trace is of the input {names[shown]}")
    say(center_note(verified.audit_rate, verified.resumes))
    if verified.trace.method != "fingerprint":
        say(OPINION)
    return {
        "method": verified.trace.method,
        "predicted": plan.data.classes[verified.trace.predicted],
        "input": shown,
        "neighbours": [f"{n.rank}: {n.record.party}" for n in verified.trace.neighbours],
    }


def _of_verdict(verified: VerifiedVerdict, inputs: NDArray[np.generic] | None) -> dict[str, object]:
    """What a verdict says, which is of all `inputs`."""
    if inputs is not None:
        check_inputs(verified, inputs)
    show(verified.verdict)
    return summary(verified.verdict)


def _place(record: RecordRef) -> str:
    return f"{record.party}/{record.shard}/{record.leaf}"


def _disclosures(path: Path) -> list[Envelope]:
    try:
        raw = read_bounded(path, limit=MAX_BUNDLE_BYTES)
        return msgspec.json.decode(raw, type=list[Envelope])
    except UNDECODABLE as error:
        raise IntegrityError(
            "disclosure.unreadable", f"{path}: {error}", step="read disclosures", fix="Get the file again."
        ) from None
