"""The plan of a repair: the same training without certain records, or without a party, for all others to approve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from caltrain.errors import ConfigError
from caltrain.participant.evidence import FinishedRun
from caltrain.plan import Plan, check_plan
from caltrain.provenance.left_out import check_places
from caltrain.records.quarantine import (
    FormerParty,
    Quarantine,
    Quarantined,
    Repair,
    file_digest,
    open_quarantine,
)

_STEP = "plan repair"


def plan_repair(
    run: FinishedRun, blamed: Iterable[Quarantined], *, without: Sequence[str] = (), earlier: bytes | None = None
) -> tuple[Plan, Quarantine]:
    """The plan that replaces the model of `run`, and the list that it names. The same evidence gives the same plan.

    Parties `without` are left out whole; what an earlier repair left out (its list is `earlier`) stays left out.

    Raises ConfigError `remedy.nothing` or `remedy.earlier`, AccessError `party.unknown`, what `check_places` raises for
    records that the run does not have, and `check_plan` for a plan that cannot be.
    """
    former = [run.plan.party(name) for name in dict.fromkeys(without)]
    gone = {party.name for party in former}
    entries = {entry for entry in (*blamed, *_earlier(run.plan, earlier)) if entry.record.party not in gone}
    if not entries and not former:
        raise ConfigError(
            "remedy.nothing",
            "nothing is named that could be left out",
            step=_STEP,
            fix="Give evidence that names records, or --without PARTY.",
        )
    quarantine = Quarantine.of(entries, run=run.manifest.run, model=run.model)
    left = tuple(party for party in run.manifest.parties if party.name not in gone)
    check_places(quarantine.commitments(), msgspec.structs.replace(run.manifest, parties=left))
    repair = Repair(
        run=quarantine.run,
        model=quarantine.model,
        quarantine=file_digest(quarantine.encode()),
        records=len(quarantine.entries),
        without=(
            *(run.plan.repair.without if run.plan.repair else ()),
            *(FormerParty(name=party.name, public_key=party.public_key) for party in former),
        ),
    )
    return _replanned(run.plan, gone, repair), quarantine


def _earlier(plan: Plan, raw: bytes | None) -> tuple[Quarantined, ...]:
    """What the run itself left out: it does not come back."""
    if (raw is None) != (not plan.repair):
        raise ConfigError(
            "remedy.earlier",
            "the run is a repair itself and its list is not given, or one is given for a run that is none",
            step=_STEP,
            fix="Give with --earlier the quarantine.json that the run's plan names, and only then.",
        )
    return open_quarantine(raw, plan.repair).entries if raw is not None and plan.repair else ()


def _replanned(plan: Plan, gone: set[str], repair: Repair) -> Plan:
    parties = tuple(party for party in plan.parties if party.name not in gone)
    if not parties:
        raise ConfigError("remedy.nothing", "no party is left", step=_STEP, fix="Leave out fewer parties.")
    quorum = min(plan.resume_quorum, len(parties))
    return check_plan(msgspec.structs.replace(plan, parties=parties, resume_quorum=quorum, repair=repair))
