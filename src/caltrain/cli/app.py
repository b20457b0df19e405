"""All commands, in noun-verb form, in the order in which a newcomer meets them."""

from __future__ import annotations

from itertools import pairwise

import typer

from caltrain import __version__
from caltrain.cli import (
    bench,
    demo,
    doctor,
    exposure,
    host,
    model,
    party,
    plan,
    predict,
    query,
    remedy,
    serving,
    verdict,
    verify,
)
from caltrain.cli.output import Format, FormatOption, choose, emit, fail
from caltrain.errors import CaltrainError, ConfigError, EnvironmentFault

_START, _PARTY, _HOST, _MORE = "Start here", "Contributors", "The operator", "More"
_OWNER, _USER = "The owner of a served model", "Model users, auditors"

app = typer.Typer(
    name="caltrain",
    help="Train one model with parties who do not trust each other, and trace its errors to their contributor.",
    epilog="Every command takes --format json. Exit codes: 0 done; 2 wrong usage; 10 plan, policy or option; "
    "11 records; 12 integrity; 13 attestation; 14 provisioning; 15 protocol; 16 access; 17 lineage; 18 this machine; "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo", rich_help_panel=_START, short_help="the whole story on one machine")(demo.demo)
app.command("doctor", rich_help_panel=_START, short_help="what holds on this machine")(doctor.doctor)
app.command("new", rich_help_panel=_START, short_help="scaffold a project")(plan.new)
app.add_typer(plan.app, name="plan", rich_help_panel=_PARTY, short_help="check, digest, approve a plan")
app.add_typer(party.app, name="party", rich_help_panel=_PARTY, short_help="keygen, seal, join, hunt, disclose")
app.add_typer(host.app, name="host", rich_help_panel=_HOST, short_help="serve a run")
app.add_typer(host.train_app, name="train", rich_help_panel=_HOST, short_help="start a run and watch it")
app.command("serve", rich_help_panel=_HOST, short_help="serve packaged models")(serving.serve)
app.add_typer(model.app, name="model", rich_help_panel=_OWNER, short_help="package a model, hand over its key")
app.command("predict", rich_help_panel=_USER, short_help="sealed by an enclave, or with a joined model")(
    predict.predict
)
app.command("proxy", rich_help_panel=_USER, short_help="plain Open Inference Protocol on this machine")(serving.proxy)
app.command("trace", rich_help_panel=_USER, short_help="which records lie behind a prediction")(query.trace)
app.command("verdict", rich_help_panel=_USER, short_help="who is responsible for errors, if that can be told")(
    verdict.verdict
)
app.command("verify", rich_help_panel=_USER, short_help="check a bundle, offline")(verify.verify)
app.add_typer(remedy.app, name="remedy", rich_help_panel=_USER, short_help="a model without the bad records")
app.add_typer(exposure.app, name="exposure", rich_help_panel=_USER, short_help="what each cut gives away, measured")
app.add_typer(bench.app, name="bench", rich_help_panel=_MORE, short_help="measure what anybody can repeat")


class WrongUsage(ConfigError):
    """A command line that cannot be read."""

    exit_code = 2


@app.command("version", rich_help_panel=_MORE, short_help="print the version")
def version(format_: FormatOption = Format.TEXT) -> None:
    """Print the version."""
    choose(format_)
    if format_ is Format.JSON:
        emit({"version": __version__})
    else:
        typer.echo(__version__)


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="caltrain", standalone_mode=False)
    except CaltrainError as error:
        return fail(error)
    except typer.TyperException as error:
        choose(Format.JSON if _asks_for_json(arguments) else Format.TEXT)
        return _wrong_usage(error)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except OSError as error:
        return fail(
            EnvironmentFault(
                "machine.refused",
                f"{error.strerror or error}: {error.filename}" if error.filename else str(error),
                step="use this machine",
                fix="Free space, look at the rights of files and folders, or choose other ones.",
            )
        )
    return result if isinstance(result, int) else 0


def _asks_for_json(arguments: list[str]) -> bool:
    return "--format=json" in arguments or ("--format", "json") in pairwise(arguments)


def _wrong_usage(error: typer.TyperException) -> int:
    what = error.format_message().strip()
    if not what:  # no arguments: the help was printed
        return WrongUsage.exit_code
    # Which command it was is known to typer's usage errors, whose class has no public name.
    path = getattr(getattr(error, "ctx", None), "command_path", "caltrain")
    return fail(WrongUsage("usage.refused", what, step="read the command line", fix=f"See {path} --help."))
