"""`caltrain party hunt`: what is suspicious of one's own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table

from caltrain.boundary.sealed import Scan
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say, say_simulated
from caltrain.cli.query import missing
from caltrain.host_client import HostClient
from caltrain.participant.confident import Confident, confident_learning
from caltrain.participant.hunt import (
    Suspicious,
    fetch_plan,
    fetch_report,
    kept_plan,
    kept_report,
    most_suspicious,
)
from caltrain.participant.identity import load_identity
from caltrain.reports.progress import waiting
from caltrain.reports.terminal import in_words, plain

_SCANS: tuple[Scan, ...] = get_args(Scan)
_CONFIDENT = "confident-learning"


def hunt(
    home: Annotated[Path, typer.Option(help="the party's folder")],
    url: Annotated[str, typer.Option(help="the host: the report is there before the model is released")] = "",
    run: Annotated[str, typer.Option(help="instead: a run whose model this party has received")] = "",
    top: Annotated[int, typer.Option(min=1, help="so many records by each scan")] = 9,
    timeout: Annotated[float, typer.Option(help="seconds to wait for the hunt, with --url")] = 86_400,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Show this party which of its own records are suspicious, by each scan, and how many of its labels are wrong."""
    choose(format_)
    identity = load_identity(home)
    if bool(url) == bool(run):
        raise missing("either --url or --run says which hunt is meant")
    if url:
        with HostClient(url) as host, waiting(console, "until the hunt is done"):
            run, report = fetch_report(host, identity, seconds=timeout)
            second = confident_learning(identity, report, lambda: fetch_plan(host, identity).data)
    else:
        report = kept_report(identity, run)
        second = confident_learning(identity, report, lambda: kept_plan(identity, run).data)
    found: dict[str, Sequence[Suspicious]] = {scan: most_suspicious(report, scan, top=top) for scan in _SCANS}
    found[_CONFIDENT] = second.wrong[:top]
    say_simulated()  # a report does not say it; this version has no other enclave
    say(_table(found))
    for party, share in report.wrong_labels.items():
        say(f"{party}: wrong labels, estimated: {in_words(share)}")
    say(_in_a_line(identity.name, second))
    emit(
        {
            "party": identity.name,
            "run": run,
            "model": report.model,
            "wrong_labels": report.wrong_labels,
            "confident_learning": {
                "outcome": second.outcome,
                "why": second.why,
                "records": second.records,
                "share": second.share,
            },
            "suspicious": {
                scan: [{"record": f"{s.shard}:{s.leaf}", "score": s.score} for s in records]
                for scan, records in found.items()
            },
        },
        title="Hunt",
        told={"wrong_labels", "suspicious", "confident_learning"},
    )


def _in_a_line(party: str, second: Confident) -> str:
    if second.share is None:
        return f"{_CONFIDENT}: {second.why}"
    return f"{party}: wrong labels, by confident learning (cleanlab): {second.share:.1%} of {second.records} records"


def _table(found: Mapping[str, Sequence[Suspicious]]) -> Table:
    """Scan by scan its records, the most suspicious first, each on one line to be copied."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("scan", "score", "record"):
        table.add_column(heading, no_wrap=heading == "record")
    for scan, records in found.items():
        for row, each in enumerate(records):
            table.add_row("" if row else scan, f"{each.score:.3f}", plain(f"{each.shard}:{each.leaf}"))
    return table
