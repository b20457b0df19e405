"""`caltrain party hunt`: what is suspicious of one's own records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.table import Table

from caltrain.boundary.sealed import Scan, SuspicionReport
from caltrain.cli.output import Format, FormatOption, choose, emit, say
from caltrain.cli.query import missing
from caltrain.host_client import HostClient
from caltrain.participant.hunt import fetch_report, kept_report, most_suspicious
from caltrain.participant.identity import load_identity
from caltrain.reports.terminal import in_words, plain

_SCANS: tuple[Scan, ...] = get_args(Scan)


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
        with HostClient(url) as host:
            run, report = fetch_report(host, identity, seconds=timeout)
    else:
        report = kept_report(identity, run)
    found = {scan: most_suspicious(report, scan, top=top) for scan in _SCANS}
    say(_table(report, top))
    for party, share in report.wrong_labels.items():
        say(f"{party}: wrong labels, estimated: {in_words(share)}")
    records = {
        scan: [{"record": f"{s.shard}:{s.leaf}", "score": s.score} for s in records] for scan, records in found.items()
    }
    emit(
        {
            "party": identity.name,
            "run": run,
            "model": report.model,
            "wrong_labels": report.wrong_labels,
            "suspicious": records,
        },
        title="Hunt",
    )


def _table(report: SuspicionReport, top: int) -> Table:
    """A column a scan, the most suspicious records first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = []
    for scan in _SCANS:
        table.add_column(scan, overflow="fold")
        records = most_suspicious(report, scan, top=top)
        columns.append([plain(f"{s.score:.3f} {s.shard}:{s.leaf}") for s in records])
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table
