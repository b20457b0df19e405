"""Run the proxy until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from datetime import datetime

import uvicorn
from starlette.types import ASGIApp

from caltrain.client.served import AsyncServedModel, Expectations
from caltrain.errors import ConfigError
from caltrain.listening import bind as listen
from caltrain.proxy.app import create_app, is_loopback

OnReady = Callable[[bool, str, int], None]


def bind(address: str, port: int) -> socket.socket:
    """A listening socket on this machine alone. Port 0 takes a free one.

    Raises ConfigError `proxy.not-loopback`, EnvironmentFault `listen.port-in-use`, `listen.refused`.
    """
    if not is_loopback(address):
        raise ConfigError(
            "proxy.not-loopback",
            f"{address[:80]!r} is not an address of this machine alone: others could read what is asked and answered",
            step="start proxy",
            fix="Use 127.0.0.1 or ::1, and run a proxy on each machine that asks.",
        )
    return listen("127.0.0.1" if address == "localhost" else address, port)


def serve(
    url: str,
    model: str,
    expected: Expectations,
    *,
    version: str | None = None,
    address: str = "127.0.0.1",
    port: int = 0,
    clock: Callable[[], datetime],
    on_ready: OnReady = lambda simulated, host, port: None,
) -> None:
    """Verify the model's enclave at `url`, then serve it until SIGINT or SIGTERM; raises that signal again.

    `on_ready` is told whether the enclave is simulated, and where the proxy listens. Before it is called: raises what
    `bind` and `AsyncServedModel.connect` do.
    """
    with bind(address, port) as sock:
        asyncio.run(_serve(url, model, expected, version=version, sock=sock, clock=clock, on_ready=on_ready))


async def _serve(
    url: str,
    model: str,
    expected: Expectations,
    *,
    version: str | None,
    sock: socket.socket,
    clock: Callable[[], datetime],
    on_ready: OnReady,
) -> None:
    async with await AsyncServedModel.connect(url, model, expected, version=version, clock=clock) as served:
        server = make_server(create_app(served))
        on_ready(served.claims.simulated, *sock.getsockname()[:2])
        await server.serve(sockets=[sock])


def make_server(app: ASGIApp) -> uvicorn.Server:
    """The web server around the application."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=256,
            timeout_graceful_shutdown=5,
            lifespan="off",
        )
    )
