"""`caltrain trace`, `caltrain verify`: a model user, and anybody who checks."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray

from caltrain.auditor.bundle import MAX_BUNDLE_BYTES, read_bundle, verify_bundle
from caltrain.auditor.collect import collect_bundle
from caltrain.cli.files import read_inputs, read_plan, read_policy, write_json
from caltrain.cli.output import Format, FormatOption, choose, emit, say, say_simulated
from caltrain.cli.verdict_text import show_verified
from caltrain.client.ask import Answered, ask
from caltrain.crypto.dsse import Envelope
from caltrain.errors import UNDECODABLE, ConfigError, IntegrityError
from caltrain.files import read_bounded
from caltrain.host_client import HostClient
from caltrain.participant.identity import load_identity
from caltrain.plan import Plan, Right
from caltrain.reports.terminal import center_note

InputsArgument = Annotated[Path, typer.Argument(help=".npy of the plan's shape: (N, C, H, W) or (C, H, W)")]
UrlOption = Annotated[str, typer.Option(help="the host")]
HomeOption = Annotated[Path | None, typer.Option(help="the model user's folder")]
PlanOption = Annotated[Path | None, typer.Option(help="plan.toml")]
PolicyOption = Annotated[Path | None, typer.Option(help="policy.toml: which enclaves this user accepts")]
_SHOWN = 3


def trace(
    inputs: InputsArgument,
    url: UrlOption,
    home: HomeOption = None,
    plan: PlanOption = None,
    policy: PolicyOption = None,
    out: Annotated[Path | None, typer.Option(help="folder for the trace bundles (one a traced input)")] = None,
    bundles: Annotated[int, typer.Option(min=0, help="write at most so many bundles")] = 10,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Ask which training records lie behind the predictions for these inputs. Each input counts against the budget."""
    choose(format_)
    answered, agreed = ask_enclave("trace", read_inputs([inputs]), url, home, plan, policy)
    if out is not None:
        write_json(out / "traces.json", answered.traces)
        with HostClient(url) as host:
            for index, envelope in enumerate(answered.envelopes[:bundles]):
                write_json(out / f"bundle-{index}.json", collect_bundle(host, agreed, envelope))
    if answered.claims.simulated:
        say_simulated()
    for statement in answered.traces[:_SHOWN]:
        tally = Counter(n.record.party for n in statement.neighbours).most_common()
        nearest = ", ".join(f"{party} {count}" for party, count in tally)
        say(f"input {statement.index}: predicted {agreed.data.classes[statement.predicted]}; nearest: {nearest}")
        for n in statement.neighbours:
            say(f"  {n.rank}. {n.record.party} --record {n.record.shard}:{n.record.leaf} distance {n.distance}")
    if len(answered.traces) > _SHOWN and out is None:
        say(f"the first {_SHOWN} of {len(answered.traces)}; --out keeps all")
    emit(
        {
            "traced": len(answered.traces),
            "budget_left": answered.answers.budget_left,
            "model": answered.answers.model,
            "simulated": answered.claims.simulated,
            "traces": answered.traces if format_ is Format.JSON else f"in {out}" if out else "shown above",
        },
        title="Trace",
    )


def verify(
    bundle: Annotated[Path, typer.Argument(help="a trace bundle")],
    plan_digest: Annotated[str, typer.Option(help="the digest of the plan, from a party that you trust to know it")],
    disclosures: Annotated[list[Path], typer.Option(help="files of disclosures to add")] = [],  # noqa: B006
    head: Annotated[str, typer.Option(help="a head of the chain that a party kept")] = "",
    format_: FormatOption = Format.TEXT,
) -> None:
    """Check a trace bundle and its disclosures, offline."""
    choose(format_)
    found = read_bundle(bundle)
    added = [envelope for path in disclosures for envelope in _disclosures(path)]
    found = msgspec.structs.replace(found, disclosures=(*found.disclosures, *added))
    if found.trace.claims("verdict"):
        show_verified(found, plan_digest=plan_digest, head=head or None)
        return
    verified = verify_bundle(found, plan_digest=plan_digest, head=head or None)
    if verified.simulated:
        say_simulated()
    say(center_note(verified.audit_rate, verified.resumes))
    if verified.front_public:
        say("training began from public weights: the FrontNet is no secret")
    emit(
        {
            "verified": True,
            "run": verified.run,
            "model": verified.model,
            "predicted": found.plan.data.classes[verified.trace.predicted],
            "neighbours": [f"{n.rank}: {n.record.party}" for n in verified.trace.neighbours],
            "disclosed": len(verified.records),
            "undisclosed": len(verified.undisclosed),
            "events": verified.events,
            "head": verified.head,
            "simulated": verified.simulated,
            "center_audited": verified.center_audited,
            "front_public": verified.front_public,
        },
        title="The bundle verifies",
    )


def _disclosures(path: Path) -> list[Envelope]:
    try:
        raw = read_bounded(path, limit=MAX_BUNDLE_BYTES)
        return msgspec.json.decode(raw, type=list[Envelope])
    except UNDECODABLE as error:
        raise IntegrityError(
            "disclosure.unreadable", f"{path}: {error}", step="read disclosures", fix="Get the file again."
        ) from None


def ask_enclave(
    kind: Right, inputs: NDArray[np.generic], url: str, home: Path | None, plan: Path | None, policy: Path | None
) -> tuple[Answered, Plan]:
    """Ask the enclave of a training run. Raises ConfigError `option.missing`, and what `ask` raises."""
    if not url or home is None or plan is None or policy is None:
        raise missing("a host's address, --home, --plan and --policy are needed to ask an enclave")
    agreed, user = read_plan(plan), load_identity(home)
    with HostClient(url) as host:
        answered = ask(
            host,
            agreed,
            read_policy(policy),
            kind=kind,
            user=user.name,
            signer=user.signer,
            inputs=inputs,
            clock=lambda: datetime.now(UTC),
        )
    return answered, agreed


def missing(what: str) -> ConfigError:
    """The error for options that belong together."""
    return ConfigError("option.missing", what, step="read options", fix="Give all of them.")
