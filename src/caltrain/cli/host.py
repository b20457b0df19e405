"""`caltrain host ...`, `caltrain train ...`, `caltrain doctor`: the operator's commands."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from caltrain.cli.files import read_plan
from caltrain.cli.output import SIMULATED, Format, FormatOption, choose, console, emit, say, wants_json
from caltrain.errors import from_wire
from caltrain.host_client import HostClient, RunStatus

app = typer.Typer(help="The machine's operator.", no_args_is_help=True)
train_app = typer.Typer(help="Start and watch a training run.", no_args_is_help=True)
_POLL = 0.2


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
    emit({"url": f"http://{host}:{bound}", "plan": agreed.digest(), "simulated_root": operator.signer.public})
    say(SIMULATED)
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
        host.post("/v1/run/start", None, RunStatus)
        status = watch(host, seconds=timeout)
    emit(status, title="Run (simulated enclave)" if status.simulated else "Run")


def watch(host: HostClient, *, seconds: float) -> RunStatus:
    """Show progress until the run is linked. Raises the run's error."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    deadline = time.monotonic() + seconds
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=wants_json()) as bar:
        task = bar.add_task("waiting", total=None, figures="")
        while True:
            status = host.status()
            if status.error is not None:
                raise from_wire(status.error)
            bar.update(task, **_line(status))
            if status.phase == "linked" or time.monotonic() > deadline:
                return status
            time.sleep(_POLL)


def _line(status: RunStatus) -> dict[str, Any]:
    mark = " (simulated enclave)" if status.simulated else ""
    if status.phase == "train":
        loss = "" if status.loss is None else f"loss {status.loss:.4f}"
        speed = "" if status.images_per_second is None else f"{status.images_per_second:,.0f} images/s"
        share = status.done / max(status.total, 1)
        return {
            "description": f"epoch {status.epoch}/{status.epochs}{mark}",
            "total": status.epochs,
            "completed": status.epoch - 1 + share,
            "figures": f"{loss}  {speed}",
        }
    if status.phase == "linked":
        return {"description": f"trained and linked{mark}", "total": 1, "completed": 1, "figures": ""}
    waiting = f"waiting for {', '.join(status.waiting_for)}" if status.waiting_for else ""
    return {
        "description": f"{status.phase}{mark}",
        "total": status.total or None,
        "completed": status.done,
        "figures": waiting,
    }


def doctor(format_: FormatOption = Format.TEXT) -> None:
    """Say what holds on this machine, and what a simulated enclave does not protect against."""
    from caltrain.attestation.measurement import measure_enclave  # noqa: PLC0415
    from caltrain.doctor import examine  # noqa: PLC0415

    choose(format_)
    report, measurement = examine(), measure_enclave()
    if wants_json():
        emit({"measurement": measurement} | msgspec.to_builtins(report))
        return
    console.print(f"measurement of the enclave program: {measurement}")
    for title, findings in (
        ("Software", report.software),
        ("Isolation", report.isolation),
        ("TEE hardware", report.hardware),
    ):
        table = Table(title=title, title_justify="left", show_header=False)
        for finding in findings:
            table.add_row(*(str(v) for v in msgspec.to_builtins(finding).values()))
        console.print(table)
    for trial in report.trials:
        console.print(msgspec.json.format(msgspec.json.encode(trial), indent=1).decode(), markup=False)
    console.print(SIMULATED)
    for line in report.not_protected:
        console.print(f"  - {line}", markup=False)
