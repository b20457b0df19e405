"""Calls an ASGI application with bodies that no honest client sends: in any chunks, without a length, cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI

from caltrain.crypto.dsse import Envelope


@dataclass
class Answered:
    """What came back, and how much of the body was taken."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pulled: int = 0
    raised: Exception | None = None

    @property
    def error(self) -> dict[str, str]:
        """The error that the body must be, and nothing else."""
        return msgspec.json.decode(self.body, type=dict[str, dict[str, str]])["error"]

    def refused(self, status: int, code: str) -> dict[str, str]:
        """The answer must be this error in the promised form. Returns its fields."""
        assert (self.status, self.error["code"]) == (status, code), self
        assert set(self.error) == {"family", "code", "what", "step", "fix"}
        assert all(self.error.values())
        assert self.headers["content-type"] == "application/json"
        assert self.headers["connection"] == "close"
        return self.error


def call(
    app: FastAPI,
    method: str,
    path: str,
    *,
    query: str = "",
    chunks: Iterable[bytes] = (),
    length: str | None = None,
    breaks_off: bool = False,
) -> Answered:
    """One request. `length` is the Content-Length to claim; `breaks_off`: the client goes away after its chunks."""
    got = Answered()
    headers = [] if length is None else [(b"content-length", length.encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    waiting = iter(chunks)

    async def receive() -> dict[str, Any]:
        try:
            body = next(waiting)
        except StopIteration:
            return {"type": "http.disconnect"} if breaks_off else {"type": "http.request", "body": b""}
        got.pulled += len(body)
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            got.status = message["status"]
            got.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            got.body += message.get("body", b"")

    async def run() -> None:
        try:
            await app(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # what the server would write to its log
            got.raised = error

    asyncio.run(run())
    return got


def post(app: FastAPI, path: str, envelope: Envelope | None = None) -> Answered:
    """POST a signed envelope."""
    return call(app, "POST", path, chunks=[b"" if envelope is None else msgspec.json.encode(envelope)])


def get(app: FastAPI, path: str, *, query: str = "") -> Answered:
    """GET."""
    return call(app, "GET", path, query=query)
