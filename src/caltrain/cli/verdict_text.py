"""A verdict for people and for programs."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from caltrain.cli.output import say
from caltrain.provenance.verdict import VerdictStatement
from caltrain.reports.terminal import center_note, in_words, plain

_SHOWN = 9
TOLD = frozenset({"outcome", "responsible", "blamed", "reason", "precision", "audit_rate", "center", "simulated"})
"""Fields of `summary` that `show` has put into words."""


def show(said: VerdictStatement) -> None:
    """The verdict in lines: what it rests on outside, who, why, the figures, the first records."""
    say(center_note(said.audit_rate, said.resumes))
    say(f"responsible: {', '.join(said.responsible)}" if said.responsible else "cannot tell who is responsible")
    say(said.reason)
    say(_blame(said))
    say("A row is the look that speaks most against a contributor: shares of blame do not add up to one.")
    if said.found:
        say(f"{said.found} records held responsible, estimated to be so rightly: {in_words(said.precision)}")
    for record in [*said.records()][:_SHOWN]:
        say(f"  {record.party} {record.shard}:{record.leaf}")


def _blame(said: VerdictStatement) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "blame", "data", "p", "p, corrected"):
        table.add_column(heading, justify="right" if heading else "left")
    for own in sorted(said.blamed, key=lambda b: (not b.responsible, b.adjusted)):
        figures = (f"{own.share_of_blame:.1%}", f"{own.share_of_data:.1%}", f"{own.p_value:g}", f"{own.adjusted:g}")
        table.add_row(plain(own.party), *figures)
    return table


def summary(said: VerdictStatement) -> dict[str, object]:
    """The verdict as fields of a result."""
    return {
        "outcome": said.outcome,
        "responsible": said.responsible,
        "blamed": said.blamed,
        "inputs": said.inputs,
        "kinds": dict(Counter(said.kinds)),
        "suspects": said.found,
        "listed": len(said.records()),
        "precision": said.precision,
        "reason": said.reason,
        "method": said.method,
        "model": said.model,
        "audit_rate": said.audit_rate,
        "center": f"audited at rate {said.audit_rate:g}" if said.audit_rate else "center not audited",
        "simulated": said.simulated,
    }
