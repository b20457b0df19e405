"""`caltrain trace`, `caltrain verify`: a model user, and anybody who checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.verify import Policy
from caltrain.auditor.bundle import MAX_BUNDLE_BYTES, check_input, judge_bundle, read_bundle
from caltrain.auditor.collect import collect_bundle
from caltrain.auditor.left_out import check_left_out
from caltrain.boundary.sealed import TraceStatement
from caltrain.cli.files import read_inputs, read_named, read_plan, read_policy, write_json
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say, say_simulated
from caltrain.client.ask import Answered, ask, most_at_once
from caltrain.crypto.dsse import Envelope
from caltrain.errors import UNDECODABLE, CaltrainError, ConfigError, IntegrityError
from caltrain.files import read_bounded
from caltrain.host_client import HostClient
from caltrain.participant.identity import Identity, load_identity
from caltrain.plan import Plan, Right
from caltrain.records.commitment import RecordRef
from caltrain.records.quarantine import MAX_QUARANTINE_BYTES
from caltrain.records.shown import Reading
from caltrain.reports.progress import counting
from caltrain.reports.terminal import center_note

InputsArgument = Annotated[
    list[Path], typer.Argument(help=".npy of (N, C, H, W) or (C, H, W), PNG and JPEG pictures, or folders of these")
]
UrlOption = Annotated[str, typer.Option(help="the host")]
HomeOption = Annotated[Path | None, typer.Option(help="the model user's folder")]
PlanOption = Annotated[Path | None, typer.Option(help="plan.toml")]
PolicyOption = Annotated[Path | None, typer.Option(help="policy.toml: which enclaves this user accepts")]
_SHOWN = 3


@dataclass(frozen=True)
class _Traced:
    """One traced input: the file that it is of, what the enclave said, and what it showed before it was asked."""

    name: str
    statement: TraceStatement
    envelope: Envelope
    evidence: EvidenceBundle


def trace(
    inputs: InputsArgument,
    url: UrlOption,
    home: HomeOption = None,
    plan: PlanOption = None,
    policy: PolicyOption = None,
    any_label: Annotated[
        bool, typer.Option("--any-label", help="the nearest records of any class, where the plan allows it")
    ] = False,
    contributor: Annotated[
        list[str], typer.Option("--contributor", help="records of this contributor alone, where the plan allows it")
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="folder for the answers, as they come, and trace bundles (one a traced input)")
    ] = None,
    bundles: Annotated[int, typer.Option(min=0, help="write at most so many bundles")] = 10,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Ask which training records lie behind the predictions for these inputs. Each input counts against the budget."""
    choose(format_)
    asking = _Asking.of(url, home, plan, policy)
    array, names = read_named(inputs)
    traced: list[_Traced] = []
    left, model, simulated, most = 0, "", False, most_at_once(asking.plan)
    try:
        with counting(console, "traced", len(array)) as advance:
            for start in range(0, max(len(array), 1), most):
                part = array[start : start + most]
                answered = asking.ask("trace", part, any_label=any_label, contributors=contributor)
                left, model, simulated = answered.answers.budget_left, answered.answers.model, answered.claims.simulated
                each = zip(names[start : start + most], answered.traces, answered.envelopes, strict=True)
                traced += [_Traced(*found, answered.evidence) for found in each]
                if out is not None:
                    write_json(out / "traces.json", _as_json(traced))
                advance(len(part))
    except CaltrainError:
        _say_traces(traced, asking.plan, all_of_them=out is None)  # what was answered was paid for
        raise
    if out is not None:
        with HostClient(url) as host:
            for index, found in enumerate(traced[:bundles]):
                bundle = collect_bundle(host, asking.plan, found.envelope, evidence=found.evidence)
                write_json(out / f"bundle-{index}.json", bundle)
    if simulated:
        say_simulated()
    _say_traces(traced, asking.plan, all_of_them=False)
    if len(traced) > _SHOWN and out is None:
        say(f"the first {_SHOWN} of {len(traced)}; --out keeps all")
    shown = _as_json(traced) if format_ is Format.JSON else {"traces": f"in {out}" if out else "shown above"}
    emit(
        {"traced": len(traced), "budget_left": left, "model": model, "simulated": simulated, **shown},
        title="Trace",
    )


def _as_json(traced: Sequence[_Traced]) -> dict[str, object]:
    """The files and rows that were asked about, and what was said of each."""
    return {"inputs": [found.name for found in traced], "traces": [found.statement for found in traced]}


def _say_traces(traced: Sequence[_Traced], plan: Plan, *, all_of_them: bool) -> None:
    for found in traced if all_of_them else traced[:_SHOWN]:
        statement = found.statement
        tally = Counter(n.record.party for n in statement.neighbours).most_common()
        nearest = ", ".join(f"{party} {count}" for party, count in tally) or "no record counts"
        say(f"{found.name}: predicted {plan.data.classes[statement.predicted]}; nearest: {nearest}")
        for n in statement.neighbours:
            label = f" {plan.data.classes[n.label]}" if statement.any_label else ""
            unusual = "" if n.unusual is None else f", as far or nearer: {n.unusual:.0%} of {statement.basis} queries"
            say(
                f"  {n.rank}. {n.record.party} --record {n.record.shard}:{n.record.leaf}{label}"
                f" distance {n.distance}{unusual}"
            )


def verify(
    bundle: Annotated[Path, typer.Argument(help="a trace bundle")],
    plan_digest: Annotated[str, typer.Option(help="the digest of the plan, from a party that you trust to know it")],
    policy: Annotated[
        Path | None, typer.Option(help="policy.toml: which enclaves and whose evidence you accept")
    ] = None,
    disclosures: Annotated[list[Path], typer.Option(help="files of disclosures to add")] = [],  # noqa: B006
    home: Annotated[Path | None, typer.Option(help="your folder, to open what is disclosed to you alone")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="what was asked about, to see that the trace is of it")
    ] = None,
    head: Annotated[str, typer.Option(help="a head of the chain that a party kept")] = "",
    quarantine: Annotated[Path | None, typer.Option(help="the list of records that a repair left out")] = None,
    left_out: Annotated[
        list[str], typer.Option(help="with --quarantine: the commitment of a record that must be in it; repeat")
    ] = [],  # noqa: B006
    format_: FormatOption = Format.TEXT,
) -> None:
    """Check a trace bundle and what its contributors answered, offline: a decision for every record that it names."""
    choose(format_)
    found, reader = read_bundle(bundle), load_identity(home) if home else None
    added = [envelope for path in disclosures for envelope in _disclosures(path)]
    found = msgspec.structs.replace(found, disclosures=(*found.disclosures, *added))
    verified = judge_bundle(
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
    shown = check_input(verified, read_inputs([input_])) if input_ else None
    if verified.simulated:
        say_simulated()
    if not verified.appraised:
        say("the enclave's evidence was not appraised: give --policy; that it was genuine is the parties' word")
    say(center_note(verified.audit_rate, verified.resumes))
    if verified.front_public:
        say("training began from public weights: the FrontNet is no secret")
    if verified.repair:
        say(verified.repair.in_words())
    for commitment in left_out:
        say(f"not used: the record with the commitment {commitment}")
    for decision in verified.decisions:
        say(f"{decision.rank}. {_place(decision.record)}: {decision.outcome}")
    faults = [decision.fault for decision in verified.decisions if decision.fault is not None]
    if faults:
        raise faults[0]
    emit(
        {
            "verified": True,
            "run": verified.run,
            "model": verified.model,
            "predicted": found.plan.data.classes[verified.trace.predicted],
            "input": None if shown is None else f"{input_}:{shown}",
            "neighbours": [f"{n.rank}: {n.record.party}" for n in verified.trace.neighbours],
            "outcomes": {_place(decision.record): decision.outcome for decision in verified.decisions},
            "disclosed": len(verified.records),
            "undisclosed": len(verified.undisclosed),
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
    )


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


@dataclass(frozen=True)
class _Asking:
    """A model user with all that it takes to ask."""

    url: str
    user: Identity
    plan: Plan
    policy: Policy

    @classmethod
    def of(cls, url: str, home: Path | None, plan: Path | None, policy: Path | None) -> _Asking:
        if not url or home is None or plan is None or policy is None:
            raise missing("a host's address, --home, --plan and --policy are needed to ask an enclave")
        return cls(url, load_identity(home), read_plan(plan), read_policy(policy))

    def ask(
        self, kind: Right, inputs: NDArray[np.generic], *, any_label: bool = False, contributors: Sequence[str] = ()
    ) -> Answered:
        with HostClient(self.url) as host:
            return ask(
                host,
                self.plan,
                self.policy,
                kind=kind,
                user=self.user.name,
                signer=self.user.signer,
                inputs=inputs,
                clock=lambda: datetime.now(UTC),
                any_label=any_label,
                contributors=contributors,
            )


def ask_enclave(
    kind: Right, inputs: NDArray[np.generic], url: str, home: Path | None, plan: Path | None, policy: Path | None
) -> tuple[Answered, Plan]:
    """Ask the enclave of a training run. Raises ConfigError `option.missing`, and what `ask` raises."""
    asking = _Asking.of(url, home, plan, policy)
    return asking.ask(kind, inputs), asking.plan


def missing(what: str) -> ConfigError:
    """The error for options that belong together."""
    return ConfigError("option.missing", what, step="read options", fix="Give all of them.")
