"""`caltrain remedy ...`: a model without the records that were found to be bad."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from caltrain.cli.output import Format, FormatOption, choose, emit, say
from caltrain.errors import ConfigError
from caltrain.files import read_bounded, write_whole
from caltrain.participant.evidence import named_by, read_run
from caltrain.participant.remedy import plan_repair
from caltrain.project import to_toml
from caltrain.records.quarantine import MAX_QUARANTINE_BYTES

app = typer.Typer(help="Repair a model: leave out records, train again, compare.", no_args_is_help=True)
ModelsOption = Annotated[list[Path], typer.Option(help="a run's or model's folder; repeat for further seeds")]


@app.command()
def plan(
    run: Annotated[Path, typer.Argument(help="a party's folder of the run that is to be repaired (runs/ID)")],
    out: Annotated[Path, typer.Option(help="folder for quarantine.json and plan.toml")],
    evidence: Annotated[
        list[Path] | None,
        typer.Argument(help="JSON lists of records, quarantine lists, signed traces or verdicts, bundles"),
    ] = None,
    without: Annotated[list[str], typer.Option(help="leave out a whole party; repeat")] = [],  # noqa: B006
    earlier: Annotated[Path | None, typer.Option(help="the list of the repair that this run was")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Write the list of records to leave out, and the plan that names it, for all other parties to approve."""
    choose(format_)
    finished = read_run(run)
    blamed = [entry for path in evidence or [] for entry in named_by(path, finished)]
    former = read_bounded(earlier, limit=MAX_QUARANTINE_BYTES) if earlier else None
    repaired, quarantine = plan_repair(finished, blamed, without=without, earlier=former)
    write_whole(out / "quarantine.json", quarantine.encode())
    write_whole(out / "plan.toml", to_toml(repaired))
    by_party = Counter(entry.record.party for entry in quarantine.entries)
    emit(
        {
            "plan": str(out / "plan.toml"),
            "digest": repaired.digest(),
            "quarantine": str(out / "quarantine.json"),
            "records": len(quarantine.entries),
            "by_party": dict(sorted(by_party.items())),
            "without": [party.name for party in repaired.repair.without] if repaired.repair else [],
            "repairs": finished.model,
        },
        title="Plan of a repair",
    )
    say("Every party looks at what is left out: the same evidence gives the same digest (`caltrain plan digest`).")
    say(f"Then it is a run like any other: caltrain host serve --quarantine {out / 'quarantine.json'} ..., party join.")
    say(f"Who asks later: caltrain verify BUNDLE --quarantine {out / 'quarantine.json'} --left-out COMMITMENT.")


@app.command()
def compare(
    trials: Annotated[Path, typer.Argument(help=".npz of clean, labels, triggered: test records (N, C, H, W)")],
    target: Annotated[str, typer.Option(help="the class that the trigger calls up")],
    before: ModelsOption,
    after: ModelsOption,
    never: ModelsOption = [],  # noqa: B006
    format_: FormatOption = Format.TEXT,
) -> None:
    """Attack success and accuracy before and after a repair, and of models that never saw the records."""
    choose(format_)
    if len(before) != len(after) or len(never) not in {0, len(after)}:
        raise ConfigError(
            "compare.pairs",
            f"{len(before)} models before, {len(after)} after, {len(never)} that never saw the records",
            step="compare models",
            fix="Give as many of each, in one order: the first of each belong together, and so on.",
        )
    from caltrain.exposure.open_model import open_subject  # noqa: PLC0415  # torch
    from caltrain.participant.compare import compare as compared  # noqa: PLC0415
    from caltrain.participant.compare import figures_of, read_trials  # noqa: PLC0415

    given = read_trials(trials)
    kinds = [[open_subject(path) for path in paths] for paths in (before, after, never)]
    found = [[figures_of(m, given, target=_class(m.data.classes, target)) for m in models] for models in kinds]
    emit(compared(*found), title=f"Trigger for {target}")


def _class(classes: tuple[str, ...], name: str) -> int:
    if name not in classes:
        raise ConfigError(
            "compare.target",
            f"the model knows no class {name[:60]!r}",
            step="compare models",
            fix=f"Name one of: {', '.join(classes[:20])}.",
        )
    return classes.index(name)
