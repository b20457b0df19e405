"""`caltrain host ...`, `caltrain train ...`: the operator's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caltrain.cli.files import read_plan
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say_simulated
from caltrain.host_client import HostClient, RunStatus
from caltrain.reports.progress import watch

app = typer.Typer(help="The machine's operator.", no_args_is_help=True)
train_app = typer.Typer(help="Start and watch a training run.", no_args_is_help=True)


@app.command()
def serve(
    plan: Annotated[Path, typer.Option(help="plan.toml")],
    folder: Annotated[Path, typer.Option(help="where the host keeps what it cannot read")],
    root: Annotated[Path, typer.Option(help="the operator's folder: its key signs simulated evidence")],
    address: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one")] = 8000,
    auto_start: Annotated[bool, typer.Option("--auto-start", help="train as soon as everybody is in")] = False,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Serve one run: launch the enclave, take in what the parties send. Ends with Ctrl-C."""
    from caltrain.host.server import bind  # noqa: PLC0415  # FastAPI is the host's alone
    from caltrain.host.server import serve as serve_run  # noqa: PLC0415
    from caltrain.participant.identity import load_identity  # noqa: PLC0415

    choose(format_)
    agreed, operator = read_plan(plan), load_identity(root)
    sock = bind(address, port)
    host, bound = sock.getsockname()[:2]
    say_simulated()
    emit(
        {
            "url": f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}",
            "plan": agreed.digest(),
            "simulated": True,
            "simulated_root": operator.signer.public,
        },
        title="Serving until Ctrl-C",
    )
    serve_run(agreed, folder=folder, sock=sock, root=operator.signer, auto_start=auto_start)


@train_app.command("run")
def train_run(
    url: Annotated[str, typer.Argument(help="the host")],
    timeout: Annotated[float, typer.Option(help="seconds to wait for the parties")] = 86_400,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Let training begin once everybody is in, and watch it to the end."""
    choose(format_)
    with HostClient(url) as host:
        if host.post("/v1/run/start", None, RunStatus).simulated:
            say_simulated()
        status = watch(host, seconds=timeout, console=console)
    emit(status, title="Run")
