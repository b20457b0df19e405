"""Offline: that a model was trained without certain records, from a bundle and the list that its plan names."""

from __future__ import annotations

from collections.abc import Iterable

from caltrain.auditor.bundle import Verified
from caltrain.auditor.verdict import VerifiedVerdict
from caltrain.errors import LineageError
from caltrain.records.quarantine import Quarantine, open_quarantine


def check_left_out(verified: Verified | VerifiedVerdict, raw: bytes, *, commitments: Iterable[str] = ()) -> Quarantine:
    """The list of records that the model of a bundle was trained without; each of `commitments` must be in it.

    What is shown: the plan names the list, every party countersigned a run of that plan, and the measured enclave
    says that this model came of it. A record that the model was linked to cannot be in the list.

    Raises IntegrityError as `open_quarantine` does, LineageError `quarantine.no-repair`, `quarantine.traced` or
    `quarantine.not-listed`.
    """
    if verified.repair is None:
        raise _refuse("quarantine.no-repair", f"the run {verified.run} is no repair: it left out nothing")
    found = open_quarantine(raw, verified.repair)
    listed = found.commitments()
    known = set(listed.values())
    traced = [record for record, commitment in verified.named.items() if record in listed or commitment in known]
    if traced:
        raise _refuse("quarantine.traced", f"the model was linked to {traced[0]}, which is in quarantine")
    for commitment in commitments:
        if commitment not in known:
            raise _refuse("quarantine.not-listed", f"no record of the list has the commitment {commitment[:80]}")
    return found


def _refuse(code: str, what: str) -> LineageError:
    return LineageError(
        code, what, step="check what was left out", fix="Do not take the record for left out; compare list and plan."
    )
