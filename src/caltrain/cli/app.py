"""All commands, in noun-verb form."""

from __future__ import annotations

import click
import typer

from caltrain import __version__
from caltrain.cli import bench, demo, host, party, plan, query
from caltrain.cli.output import fail
from caltrain.errors import CaltrainError

app = typer.Typer(
    name="caltrain",
    help="Train one model with parties who do not trust each other, and trace its errors to their contributor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo")(demo.demo)
app.command("new")(plan.new)
app.add_typer(plan.app, name="plan")
app.add_typer(party.app, name="party")
app.add_typer(host.app, name="host")
app.add_typer(host.train_app, name="train")
app.command("predict")(query.predict)
app.command("trace")(query.trace)
app.command("verify")(query.verify)
app.command("doctor")(host.doctor)
app.add_typer(bench.app, name="bench")


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code. KeyboardInterrupt passes through."""
    command = typer.main.get_command(app)
    try:
        result = command.main(args=arguments, prog_name="caltrain", standalone_mode=False)
    except CaltrainError as error:
        return fail(error)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else 0
