"""`caltrain trace`: which records lie behind a prediction, and how any question is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.attestation.verify import Policy
from caltrain.auditor.collect import collect_bundle
from caltrain.boundary.sealed import TraceStatement
from caltrain.cli.files import read_named, read_plan, read_policy, write_json
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say, say_simulated
from caltrain.client.ask import Answered, ask, most_at_once
from caltrain.crypto.dsse import Envelope
from caltrain.errors import CaltrainError, ConfigError
from caltrain.host_client import HostClient
from caltrain.participant.identity import Identity, load_identity
from caltrain.plan import Method, Plan, Right
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
OPINION = "a second opinion is no evidence of guilt"


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
    method: Annotated[
        Method, typer.Option(help="how records are ranked: another than fingerprint is a second opinion")
    ] = "fingerprint",
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
                answered = asking.ask("trace", part, any_label=any_label, contributors=contributor, method=method)
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
    if traced:
        say(center_note(traced[0].statement.audit_rate, traced[0].statement.resumes))
    _say_traces(traced, asking.plan, all_of_them=False)
    if len(traced) > _SHOWN and out is None:
        say(f"the first {_SHOWN} of {len(traced)}; --out keeps all")
    shown = _as_json(traced) if format_ is Format.JSON else {"traces": f"in {out}" if out else "shown above"}
    emit(
        {
            "traced": len(traced),
            "method": method,
            "budget_left": left,
            "model": model,
            "simulated": simulated,
            **shown,
        },
        title="Trace",
    )


def _as_json(traced: Sequence[_Traced]) -> dict[str, object]:
    """The files and rows that were asked about, and what was said of each."""
    return {"inputs": [found.name for found in traced], "traces": [found.statement for found in traced]}


def ranked_by(statement: TraceStatement) -> str:
    """What is first among the records of a trace."""
    return "nearest" if statement.method == "fingerprint" else f"first by {statement.method}"


def _say_traces(traced: Sequence[_Traced], plan: Plan, *, all_of_them: bool) -> None:
    for found in traced if all_of_them else traced[:_SHOWN]:
        statement = found.statement
        tally = Counter(n.record.party for n in statement.neighbours).most_common()
        nearest = ", ".join(f"{party} {count}" for party, count in tally) or "no record counts"
        say(f"{found.name}: predicted {plan.data.classes[statement.predicted]}; {ranked_by(statement)}: {nearest}")
        if any(n.unusual is not None for n in statement.neighbours):
            say(f"  unusual: share of {statement.references} {statement.basis} queries that are at most as far")
        for n in statement.neighbours:
            label = f" label {plan.data.classes[n.label]}" if statement.any_label else ""
            distance = "" if n.distance is None else f" distance {n.distance:g}"
            unusual = "" if n.unusual is None else f" unusual {n.unusual:.2f}"
            say(f"  {n.rank}. {n.record.party} {n.record.shard}:{n.record.leaf}{label}{distance}{unusual}")
    if any(found.statement.method != "fingerprint" for found in traced):
        say(OPINION)


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
        self,
        kind: Right,
        inputs: NDArray[np.generic],
        *,
        any_label: bool = False,
        contributors: Sequence[str] = (),
        method: Method = "fingerprint",
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
                method=method,
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
