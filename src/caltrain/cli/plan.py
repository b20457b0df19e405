"""`caltrain new`, `caltrain plan ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caltrain.cli.files import read_plan, write_json
from caltrain.cli.output import Format, FormatOption, choose, emit, say
from caltrain.files import read_bounded
from caltrain.models.darknet_text import MAX_CFG_BYTES
from caltrain.participant.identity import load_identity
from caltrain.plan_summary import summarise
from caltrain.presets import STARTS, StartName, preset_from_cfg, with_cut
from caltrain.project import DEFAULT_PARTIES, create_project

app = typer.Typer(help="The plan that all parties sign.", no_args_is_help=True)
PlanArgument = Annotated[Path, typer.Argument(help="plan.toml")]


def new(
    folder: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    data: Annotated[
        StartName | None, typer.Option(help="whose model, schema and hyper-parameters to start from; default: digits")
    ] = None,
    parties: Annotated[list[str], typer.Option("--party", help="a party's name; repeat")] = DEFAULT_PARTIES,
    users: Annotated[list[str], typer.Option("--user", help="a model user's name; repeat")] = ["analyst"],  # noqa: B006
    cfg: Annotated[
        Path | None,
        typer.Option(help="a Darknet cfg for model and hyper-parameters; --data then gives the schema only"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=10_000, help="in place of those of --data or --cfg")] = None,
    records: Annotated[
        int | None, typer.Option(min=1, help="with --cfg: of all parties, to have its max_batches as epochs")
    ] = None,
    front: Annotated[int | None, typer.Option(min=0, help="layers of the FrontNet; of a cfg: 4")] = None,
    head: Annotated[
        int | None,
        typer.Option(min=0, help="layers of the HeadNet, 0 for two-way; of a cfg: from the last with weights"),
    ] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Scaffold a project: plan, policy, and keys for everybody, to try a whole run on one machine."""
    choose(format_)
    if records and cfg is None:
        raise typer.BadParameter("only with --cfg", param_hint="--records")
    preset = STARTS[data or "digits"]
    if cfg is not None:
        schema, text = STARTS[data].data if data else None, read_bounded(cfg, limit=MAX_CFG_BYTES)
        preset = preset_from_cfg(text, data=schema, epochs=epochs, records=records)
    project = create_project(
        folder,
        preset=with_cut(preset, front=front, head=head),
        title=cfg.stem[:60] if cfg else data or "digits",
        parties=parties,
        users=users,
        epochs=epochs,
    )
    emit({"folder": str(folder), "plan": str(project.plan_path), "digest": project.plan.digest()}, title="New project")
    say("policy.toml accepts a simulated enclave, whose operator can read everything.")
    say("For a real run each party makes its own keys (`caltrain party keygen`); the plan gets their public part.")


@app.command()
def check(path: PlanArgument, format_: FormatOption = Format.TEXT) -> None:
    """Check a plan and say what it amounts to."""
    choose(format_)
    emit(summarise(read_plan(path)), title="The plan is usable")


@app.command()
def digest(path: PlanArgument, format_: FormatOption = Format.TEXT) -> None:
    """Print the digest that the parties sign."""
    choose(format_)
    plan = read_plan(path)
    if format_ is Format.JSON:
        emit({"digest": plan.digest()})
    else:
        typer.echo(plan.digest())


@app.command()
def approve(
    path: PlanArgument,
    home: Annotated[Path, typer.Option(help="the party's folder")],
    out: Annotated[Path, typer.Option(help="where to write the signed approval")],
    format_: FormatOption = Format.TEXT,
) -> None:
    """Sign the plan's digest as a party. (`party join` does this, too.)"""
    from caltrain.participant.join import approval_of  # noqa: PLC0415  # keeps `plan check` quick

    choose(format_)
    plan, identity = read_plan(path), load_identity(home)
    write_json(out, approval_of(plan, identity))
    emit({"party": identity.name, "plan": plan.digest(), "approval": str(out)}, title="Approved")
