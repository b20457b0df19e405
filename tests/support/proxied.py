"""A proxy in front of a scripted host: called in memory, or listening for clients that nobody here wrote."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from caltrain.proxy.app import create_app
from caltrain.proxy.server import bind, make_server
from support.scripted_served import ScriptedServed

LOCAL = "http://127.0.0.1:8001"


def call(host: ScriptedServed, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to a proxy of this host, in memory."""

    async def run() -> httpx.Response:
        async with await host.connect_async() as served:
            transport = httpx.ASGITransport(create_app(served), raise_app_exceptions=False)
            async with httpx.AsyncClient(base_url=LOCAL, transport=transport) as http:
                return await http.request(method, path, **options)

    return asyncio.run(run())


@contextmanager
def listening(host: ScriptedServed) -> Iterator[str]:
    """The address of a proxy of this host that listens."""
    started, ended = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    async def serve() -> None:
        async with await host.connect_async() as served:
            server = make_server(create_app(served))
            task = asyncio.create_task(server.serve(sockets=[sock]))
            started.set()
            while not ended.is_set() and not task.done():
                await asyncio.sleep(0.01)
            server.should_exit = True
            await task

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001  # shown by the test's own thread
            failed.append(error)
        finally:
            started.set()

    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=run)
        thread.start()
        started.wait(20)
        try:
            yield f"127.0.0.1:{sock.getsockname()[1]}"
        finally:
            ended.set()
            thread.join(20)
    if failed:
        raise failed[0]
