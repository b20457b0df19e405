"""`caltrain serve`, `caltrain proxy`: the host of served models, and the verifying proxy on a user's machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from caltrain.cli.files import read_key, read_policy
from caltrain.cli.host import DeviceChoice
from caltrain.cli.output import Format, FormatOption, choose, emit, say_simulated
from caltrain.cli.predict import CredentialOption, OwnerOption, VersionOption, read_credential
from caltrain.listening import bind
from caltrain.participant.identity import load_identity

PortOption = Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one")]


def serve(
    packages: Annotated[list[Path], typer.Argument(help="folders of packages")],
    root: Annotated[Path, typer.Option(help="the operator's folder: its key signs simulated evidence")],
    address: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: PortOption = 8000,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="threads that compute, inside and outside")] = 2,
    device: Annotated[DeviceChoice, typer.Option(help="where CenterNets compute, as far as packages allow")] = "auto",
    format_: FormatOption = Format.TEXT,
) -> None:
    """Serve packaged models. SIGHUP reads the folders again, Ctrl-C finishes what is under way and ends."""
    from caltrain.host.serving.server import serve as serve_packages  # noqa: PLC0415  # FastAPI is the host's alone

    choose(format_)
    operator = load_identity(root)
    sock = bind(address, port)
    served = {"url": _url(*sock.getsockname()[:2]), "simulated": True, "simulated_root": operator.signer.public}

    def on_ready() -> None:
        say_simulated()
        emit(served, title="Serving until Ctrl-C; each model waits for its owner (`caltrain model grant`)")

    serve_packages(packages, root=operator.signer, sock=sock, threads=threads, device=device, on_ready=on_ready)


def proxy(
    url: Annotated[str, typer.Argument(help="the serving host")],
    model: Annotated[str, typer.Option(help="the served model's name")],
    owner: OwnerOption,
    home: Annotated[Path, typer.Option(help="the model user's folder")],
    policy: Annotated[Path, typer.Option(help="policy.toml: which enclaves this user accepts")],
    version: VersionOption = "",
    credential: CredentialOption = None,
    address: Annotated[str, typer.Option(help="a loopback address to listen on")] = "127.0.0.1",
    port: PortOption = 8001,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Speak the plain Open Inference Protocol on this machine; verify the enclave, seal and open behind it."""
    from caltrain.client.served import Expectations  # noqa: PLC0415
    from caltrain.proxy.server import serve as serve_proxy  # noqa: PLC0415

    choose(format_)
    user = load_identity(home)
    expected = Expectations(
        owner=read_key(owner),
        policy=read_policy(policy),
        user=user.name,
        signer=user.signer,
        credential=read_credential(credential),
    )

    def on_ready(simulated: bool, host: str, bound: int) -> None:
        if simulated:
            say_simulated()
        emit({"url": _url(host, bound), "model": model, "simulated": simulated}, title="Proxy until Ctrl-C")

    serve_proxy(
        url,
        model,
        expected,
        version=version or None,
        address=address,
        port=port,
        clock=lambda: datetime.now(UTC),
        on_ready=on_ready,
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
