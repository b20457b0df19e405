"""A verdict as one HTML page: who, how sure that is, which records, and what it rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from caltrain.provenance.verdict import VerdictStatement
from caltrain.reports.page import write_page

_SHOWN = 200


def write_verdict(path: Path, said: VerdictStatement, *, names: Sequence[str], classes: Sequence[str]) -> None:
    """Render a verdict on inputs called `names`, of a plan with these `classes`, to `path`.

    Raises EnvironmentFault `file.not-written`, IntegrityError `verdict.malformed`.
    """
    listed = [(record.party, f"{record.shard}:{record.leaf}", text) for record, text in said.records().items()]
    inputs = zip(names, said.predicted, said.kinds, strict=True)
    write_page(
        path,
        "verdict.html",
        said=said,
        kinds=kinds_of(said),
        inputs=[(name, classes[predicted], kind) for name, predicted, kind in inputs],
        shown=listed[:_SHOWN],
        listed=len(listed),
    )


def kinds_of(said: VerdictStatement) -> dict[str, int]:
    """How many inputs are of each kind, the most common first."""
    return dict(Counter(said.kinds).most_common())
