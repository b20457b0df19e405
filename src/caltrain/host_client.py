"""How a party or a model user reaches the host over HTTP. The host is hostile: every answer is bounded and typed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope
from caltrain.errors import (
    UNDECODABLE,
    AccessError,
    CaltrainError,
    ConfigError,
    EnvironmentFault,
    ProtocolError,
    from_wire,
)

MAX_ARTIFACT = 8 << 30
_RETRIES = 7
_STEP = "talk to host"
UNREACHABLE = (httpx.TransportError, UnicodeError)
"""What a call raises without an answer. UnicodeError: a host name that cannot be one."""
T = TypeVar("T")


class HeldOut(msgspec.Struct):
    """How the model does on the held-out records after an epoch."""

    records: int
    loss: float
    top1: float
    top2: float


class RunStatus(msgspec.Struct):
    """What the host says of the run: for people to look at, never to rely on."""

    phase: str
    simulated: bool = True
    done: int = 0
    total: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    held_out: HeldOut | None = None
    images_per_second: float | None = None
    waiting_for: list[str] = []
    ignored: list[str] = []
    sandbox: dict[str, str] = {}
    audit_rate: float = 0.0
    cut: int | None = None
    error: dict[str, str] | None = None


class HostClient:
    """A connection to one host. `transport` is for tests. Raises ConfigError `host.bad-address`."""

    def __init__(self, url: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self._http = httpx.Client(**plain_http(url), transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, type_: type[T], *, params: dict[str, str] | None = None) -> T:
        """GET JSON of a known type."""
        return read_json(self._call("GET", path, params=params), type_)

    def check(self, path: str) -> None:
        """GET what has no content: raises the host's error, if it answers with one."""
        self._call("GET", path)

    def post(self, path: str, envelope: Envelope | None, type_: type[T]) -> T:
        """POST a signed envelope, get JSON of a known type."""
        body = b"" if envelope is None else msgspec.json.encode(envelope)
        return read_json(self._call("POST", path, content=body), type_)

    def post_bytes(self, path: str, envelope: Envelope, *, limit: int) -> bytes:
        """POST a signed envelope, get bytes."""
        return self._call("POST", path, content=msgspec.json.encode(envelope), limit=limit)

    def artifact(self, name: str, *, limit: int = MAX_ARTIFACT) -> bytes:
        """What the run left under that name."""
        return self._call("GET", f"/v1/artifacts/{name}", limit=limit)

    def tail(self, name: str, *, offset: int, limit: int) -> bytes:
        """What was added to a log of the run beyond `offset`; nothing while there is no such log."""
        try:
            return self._call("GET", f"/v1/artifacts/{name}", limit=limit, params={"offset": str(offset)})
        except AccessError as error:
            if error.code != "http.no-such-artifact":
                raise
            return b""

    def upload(self, path: str, file: Path) -> None:
        """PUT a file, streamed."""

        def chunks() -> Iterator[bytes]:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    yield chunk

        length = {"Content-Length": str(file.stat().st_size)}
        self._call("PUT", path, retries=0, content=chunks(), headers=length)

    def status(self) -> RunStatus:
        """The host's word on the run."""
        return self.get("/v1/run", RunStatus)

    def wait_for(
        self, phases: set[str], *, seconds: float, poll: float = 0.25, on_poll: Callable[[], None] = lambda: None
    ) -> RunStatus:
        """Poll until the run is in one of `phases`. Raises the run's error, or `host.too-slow`."""
        deadline = time.monotonic() + seconds
        while True:
            on_poll()
            status = self.status()
            if status.error is not None:
                raise from_wire(status.error)
            if status.phase in phases:
                return status
            if time.monotonic() > deadline:
                awaited = ", ".join(status.waiting_for) or "itself"
                raise EnvironmentFault(
                    "host.too-slow",
                    f"the run is still in phase {status.phase!r}, waiting for {awaited}",
                    step=f"wait for {' or '.join(sorted(phases))}",
                    fix="Ask those who are waited for, or wait longer with --timeout.",
                )
            time.sleep(poll)

    def _call(
        self, method: str, path: str, *, limit: int = MAX_ENVELOPE_BYTES, retries: int = _RETRIES, **options: Any
    ) -> bytes:
        while True:
            try:
                status, body = self._once(method, path, limit, options)
            except UNREACHABLE as error:
                raise unreachable(error) from error
            if 200 <= status < 300:
                return body
            failure = read_failure(status, body)
            if failure.code != "enclave.busy" or retries == 0:
                raise failure
            retries -= 1
            time.sleep(1)

    def _once(self, method: str, path: str, limit: int, options: dict[str, Any]) -> tuple[int, bytes]:
        with self._http.stream(method, path, **options) as response:
            check_plain(response)
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > limit:
                    raise garbage(f"more than {limit} bytes for {path}")
            return response.status_code, bytes(body)


def plain_http(url: str) -> dict[str, Any]:
    """How every client of a host is set up. Raises ConfigError `host.bad-address`."""
    try:
        base = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(
            "host.bad-address", f"{url[:200]!r}: {error}", step=_STEP, fix="Give it as http://ADDRESS:PORT."
        ) from None
    # trust_env off: proxies from the environment have no business between a party and its host.
    # No compression: a few bytes of it could unpack into more memory than there is.
    plain = {"Accept-Encoding": "identity"}
    return {"base_url": base, "headers": plain, "timeout": httpx.Timeout(60, connect=10), "trust_env": False}


def check_plain(response: httpx.Response) -> None:
    """Raise ProtocolError `host.garbage` for a compressed answer, before any of it is read."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise garbage(f"an answer packed with {encoding[:40]!r}, which was not asked for")


def unreachable(error: Exception) -> EnvironmentFault:
    """The error for one of `UNREACHABLE`."""
    return EnvironmentFault(
        "host.unreachable",
        f"no answer from the host: {type(error).__name__}: {error}",
        step=_STEP,
        fix="Check the address, and that the host is running.",
    )


def read_json(body: bytes, type_: type[T]) -> T:
    """An answer of a known type. Raises ProtocolError `host.garbage`."""
    try:
        return json_decoder(type_).decode(body)
    except UNDECODABLE as error:
        raise garbage(str(error)) from None


def read_failure(status: int, body: bytes) -> CaltrainError:
    """The error that the host reports; `host.garbage` where it is not one."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        # Open Inference Protocol: `error` is a text for people, `detail` has the fields.
        return from_wire(msgspec.convert(fields.get("detail", fields["error"]), dict[str, str]))
    except (*UNDECODABLE, KeyError):
        return garbage(f"HTTP status {status} without a readable error")


def garbage(what: str) -> ProtocolError:
    """The error for an answer that no host of this version gives."""
    return ProtocolError(
        "host.garbage",
        f"the host's answer makes no sense: {what}",
        step=_STEP,
        fix="Check that the address is that of a caltrain host of the same version.",
    )
