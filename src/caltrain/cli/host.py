"""`caltrain host ...`, `caltrain train ...`: the operator's commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from caltrain.cli.files import read_plan
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say, say_simulated
from caltrain.host_client import HostClient, RunStatus
from caltrain.listening import bind
from caltrain.reports.progress import watch
from caltrain.reports.terminal import center_note
from caltrain.reports.tracking import open_sinks

if TYPE_CHECKING:
    from caltrain.host.given import What

DeviceChoice = Literal["auto", "cpu", "cuda"]
LogOption = Annotated[Path | None, typer.Option("--log", help="append the run's figures to this file (JSON lines)")]
TensorBoardOption = Annotated[Path | None, typer.Option("--tensorboard", help="write event files to this folder")]
MLflowOption = Annotated[str | None, typer.Option("--mlflow", help="log to this MLflow address or folder")]
_COMMANDS = {"resume": "party rejoin", "cut": "party agree-cut", "assess": "party assess"}

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
    resume: Annotated[
        bool, typer.Option("--resume", help="take up the run that lies in --folder; its parties must agree")
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="give up an unfinished run that lies in --folder, for good")
    ] = False,
    device: Annotated[
        DeviceChoice, typer.Option(help="where the CenterNet computes, as far as the plan allows")
    ] = "auto",
    wheel: Annotated[Path | None, typer.Option(help="the wheel of stages that the plan names")] = None,
    initial: Annotated[Path | None, typer.Option(help="the public weights (safetensors) that the plan names")] = None,
    quarantine: Annotated[Path | None, typer.Option(help="the list of a repair that the plan names")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Serve one run: launch the enclave, take in what the parties send. Ends with Ctrl-C."""
    from caltrain.host.given import check_given  # noqa: PLC0415
    from caltrain.host.server import serve as serve_run  # noqa: PLC0415  # FastAPI is the host's alone
    from caltrain.participant.identity import load_identity  # noqa: PLC0415

    choose(format_)
    if resume and anew:
        raise typer.BadParameter("not together with --resume", param_hint="--anew")
    agreed, operator = read_plan(plan), load_identity(root)
    offered: dict[What, Path | None] = {"wheel": wheel, "initial": initial, "quarantine": quarantine}
    files = {what: path for what, path in offered.items() if path is not None}
    check_given(agreed, files, kept=folder if resume else None)
    sock = bind(address, port)
    host, bound = sock.getsockname()[:2]
    served = {
        "url": f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}",
        "plan": agreed.digest(),
        "simulated": True,
        "simulated_root": operator.signer.public,
    }

    def on_ready() -> None:
        say_simulated()
        emit(served, title="Serving until Ctrl-C")

    serve_run(
        agreed,
        folder=folder,
        sock=sock,
        root=operator.signer,
        auto_start=auto_start,
        resume=resume,
        anew=anew,
        device=device,
        given=files,
        on_ready=on_ready,
    )


@train_app.command("run")
def train_run(
    url: Annotated[str, typer.Argument(help="the host")],
    timeout: Annotated[float, typer.Option(help="seconds to wait for the parties")] = 86_400,
    log: LogOption = None,
    tensorboard: TensorBoardOption = None,
    mlflow: MLflowOption = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Let training begin once everybody is in, and watch it to the end."""
    choose(format_)
    with HostClient(url) as host, open_sinks(jsonl=log, tensorboard=tensorboard, mlflow=mlflow) as sinks:
        begun = host.post("/v1/run/start", None, RunStatus)
        if begun.simulated:
            say_simulated()
        say(center_note(begun.audit_rate))
        status = watch(host, seconds=timeout, console=console, sinks=sinks)
    emit(status, title="Run")


@train_app.command("resume")
def train_resume(
    url: Annotated[str, typer.Argument(help="the host, served with --resume")],
    timeout: Annotated[float, typer.Option(help="seconds to wait for the parties and the run")] = 86_400,
    log: LogOption = None,
    tensorboard: TensorBoardOption = None,
    mlflow: MLflowOption = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Watch a run that was taken up to its end; says whose word it waits for (`caltrain party rejoin`)."""
    choose(format_)
    with HostClient(url) as host, open_sinks(jsonl=log, tensorboard=tensorboard, mlflow=mlflow) as sinks:
        if host.status().simulated:
            say_simulated()
        status = watch(host, seconds=timeout, console=console, sinks=sinks, on_status=WaitedFor())
    emit(status, title="Run")


class WaitedFor:
    """Says once each time who is waited for, and for what."""

    def __init__(self) -> None:
        self._said: tuple[str, ...] = ()

    def __call__(self, status: RunStatus) -> None:
        """Say it, if it is news."""
        waited = (status.phase, *status.waiting_for) if status.phase in _COMMANDS and status.waiting_for else ()
        if waited and waited != self._said:
            names, command = ", ".join(status.waiting_for), _COMMANDS[status.phase]
            say(f"waiting for the word of: {names} (caltrain {command})")
        elif self._said and not waited:
            say("the run goes on")
        self._said = waited


@train_app.command("move-cut")
def train_move_cut(
    url: Annotated[str, typer.Argument(help="the host")],
    front: Annotated[int, typer.Option(min=0, help="layers of the FrontNet from the next epoch on")],
    format_: FormatOption = Format.TEXT,
) -> None:
    """Move the cut when the next epoch begins; a shallower one waits for every party's `party agree-cut`."""
    choose(format_)
    with HostClient(url) as host:
        status = host.post(f"/v1/run/cut?front={front}", None, RunStatus)
    emit({"front": status.cut, "from_epoch": max(status.epoch, 1) + 1, "phase": status.phase}, title="Asked for")
