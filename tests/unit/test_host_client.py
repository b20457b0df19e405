"""The client against a hostile host: every answer is bounded and typed, or refused by name."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.attestation.evidence import EvidenceBundle
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope
from caltrain.errors import AccessError, ConfigError, EnvironmentFault, ProtocolError
from caltrain.host_client import HostClient, RunStatus
from caltrain.plan import Plan
from support.samples import refused, signer

Handler = Callable[[httpx.Request], httpx.Response]
ENVELOPE = signer("alpha").sign("plan-approval", {})


def client(handler: Handler) -> HostClient:
    """A client of a host that answers so."""
    return HostClient("http://host.test", transport=httpx.MockTransport(handler))


def answers(body: bytes | Iterator[bytes], status: int = 200, **headers: str) -> Handler:
    """A host that has one answer."""
    return lambda _: httpx.Response(status, content=body, headers=headers)


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits in these tests; how long they would have."""
    naps: list[float] = []
    monkeypatch.setattr("time.sleep", naps.append)
    return naps


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "html": b"<!doctype html><title>It works!</title>",
    "no utf-8": b'{"phase":"\xff\xfe"}',
    "null": b"null",
    "a number": b"12345678901234567890",
    "a list": b"[]",
    "an empty object": b"{}",
    "a wrong type": b'{"phase":7,"binding":[],"payload":{},"version":"one"}',
    "half of it": b'{"phase":"li',
    "two of it": b'{"phase":"linked"}{"phase":"linked"}',
    "not a number": b'{"phase":"linked","loss":NaN}',
    "an endless number": b'{"phase":"linked","done":' + b"9" * 5000 + b"}",
    "an abyss": b'{"phase":"linked","more":' + b"[" * 100_000,
    "an abyss of objects": b'{"a":' * 100_000,
}


OBJECTS = {"an empty object", "a wrong type", "an endless number"}
TYPED: list[tuple[type[Any], str]] = [
    (type_, what) for type_ in (RunStatus, Envelope, EvidenceBundle, Plan) for what in GARBAGE
]
UNTYPED: list[tuple[type[Any], str]] = [(dict[str, Any], what) for what in GARBAGE if what not in OBJECTS]


@pytest.mark.parametrize(("type_", "what"), TYPED + UNTYPED)
def test_garbage_is_refused_whatever_was_asked_for(type_: type[Any], what: str) -> None:
    with client(answers(GARBAGE[what])) as host:
        with refused(ProtocolError, "host.garbage"):
            host.get("/v1/x", type_)
        with refused(ProtocolError, "host.garbage"):
            host.post("/v1/x", ENVELOPE, type_)


def endless(read: list[int]) -> Iterator[bytes]:
    """Megabytes without end, counted."""
    while True:
        read.append(1 << 20)
        yield bytes(1 << 20)


def test_an_answer_without_end_is_not_read_on() -> None:
    asking: list[tuple[Callable[[HostClient], object], int]] = [
        (lambda host: host.get("/v1/x", RunStatus), MAX_ENVELOPE_BYTES),
        (lambda host: host.artifact("center", limit=3 << 20), 3 << 20),
        (lambda host: host.post_bytes("/v1/x", ENVELOPE, limit=5 << 20), 5 << 20),
    ]
    for ask, limit in asking:
        read: list[int] = []
        with client(answers(endless(read))) as host, refused(ProtocolError, "host.garbage"):
            ask(host)
        assert sum(read) <= limit + (1 << 20)


def test_an_answer_of_just_the_limit_is_taken() -> None:
    with client(answers(bytes(1000))) as host:
        assert host.artifact("center", limit=1000) == bytes(1000)
        with refused(ProtocolError, "host.garbage"):
            host.artifact("center", limit=999)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_an_answer_that_unpacks_to_more_is_not_unpacked(encoding: str) -> None:
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        stream = httpx.ByteStream(gzip.compress(bytes(32 << 20)))
        return httpx.Response(200, stream=Unread(stream), headers={"Content-Encoding": encoding})

    with client(handle) as host, refused(ProtocolError, "host.garbage"):
        host.get("/v1/x", dict[str, Any])
    assert requests[0].headers["accept-encoding"] == "identity"


class Unread(httpx.SyncByteStream):
    """A body that must not be read."""

    def __init__(self, stream: httpx.ByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("the body was read")


@pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 400, 404, 500, 502, 599])
@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b'{"error":"text"}', b'{"error":{"code":1}}', b"[1]", b"[" * 99_999]
)
def test_a_failure_without_a_readable_error_is_garbage(status: int, body: bytes) -> None:
    with client(answers(body, status, location="http://elsewhere.test/")) as host:
        with refused(ProtocolError, "host.garbage") as caught:
            host.get("/v1/x", dict[str, Any])
        assert str(status) in caught.value.what
        with refused(ProtocolError, "host.garbage"):
            host.artifact("center")


def test_the_hosts_error_is_raised_as_one_of_ours() -> None:
    error = AccessError("party.unknown", "no", step="look up party", fix="Use the name.").diagnostics()
    with client(answers(msgspec.json.encode({"error": error}), 403)) as host, refused(AccessError, "party.unknown"):
        host.get("/v1/x", RunStatus)


def test_an_error_of_no_known_family_is_a_protocol_error() -> None:
    body = b'{"error":{"family":"KeyboardInterrupt","code":"x.y"}}'
    with client(answers(body, 400)) as host, refused(ProtocolError, "x.y"):
        host.get("/v1/x", RunStatus)


BUSY = msgspec.json.encode(
    {"error": EnvironmentFault("enclave.busy", "at work", step="request", fix="Again.").diagnostics()}
)


def test_a_busy_enclave_is_asked_again(slept: list[float]) -> None:
    left = [httpx.Response(503, content=BUSY), httpx.Response(503, content=BUSY), httpx.Response(200, content=b"{}")]
    with client(lambda _: left.pop(0)) as host:
        assert host.get("/v1/x", dict[str, Any]) == {}
    assert slept == [1, 1]


def test_an_enclave_that_stays_busy_is_given_up(slept: list[float]) -> None:
    with client(answers(BUSY, 503)) as host, refused(EnvironmentFault, "enclave.busy"):
        host.get("/v1/x", dict[str, Any])
    assert len(slept) == 7


def test_other_errors_are_not_asked_again() -> None:
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(500, content=b"")

    with client(handle) as host, refused(ProtocolError, "host.garbage"):
        host.get("/v1/x", dict[str, Any])
    assert len(asked) == 1


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError, httpx.ReadError])
def test_a_host_that_does_not_answer_is_unreachable(error: type[httpx.TransportError]) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error("gone")

    with client(fail) as host, refused(EnvironmentFault, "host.unreachable"):
        host.status()


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    def half() -> Iterator[bytes]:
        yield b'{"phase":'
        raise httpx.ReadError("connection reset")

    with client(answers(half())) as host, refused(EnvironmentFault, "host.unreachable"):
        host.status()


def test_nobody_listens_there() -> None:
    with HostClient("http://127.0.0.1:9") as host, refused(EnvironmentFault, "host.unreachable"):
        host.status()


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port", "http://\0"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with refused(ConfigError, "host.bad-address"):
        HostClient(url)


@pytest.mark.parametrize("url", ["host", "ftp://host", "", "http://127.0.0.1:99999", "http://a..b"])
def test_an_address_that_leads_nowhere_is_unreachable(url: str) -> None:
    with HostClient(url) as host, refused(EnvironmentFault, "host.unreachable"):
        host.status()


def test_proxies_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:1")
    with HostClient("http://127.0.0.1:9") as host:
        assert not host._http.trust_env


@pytest.mark.parametrize("size", [0, 10, (1 << 20) + 1])
def test_a_file_is_sent_whole_with_its_length(tmp_path: Path, size: int) -> None:
    got: dict[str, Any] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        got.update(body=request.read(), length=request.headers["content-length"])
        return httpx.Response(200)

    (tmp_path / "file").write_bytes(bytes(size))
    with client(handle) as host:
        host.upload("/v1/x", tmp_path / "file")
    assert got == {"body": bytes(size), "length": str(size)}


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [(302, b"", "host.garbage"), (503, BUSY, "enclave.busy"), (500, b"<html>", "host.garbage")],
)
def test_a_refused_upload_is_not_taken_for_done(tmp_path: Path, status: int, body: bytes, code: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    family = EnvironmentFault if code == "enclave.busy" else ProtocolError
    with client(answers(body, status, location="/")) as host, refused(family, code):
        host.upload("/v1/x", tmp_path / "file")


def phases(*statuses: dict[str, Any]) -> Handler:
    """A host whose run goes through these, and stays in the last."""
    left = list(statuses)
    return lambda _: httpx.Response(200, content=msgspec.json.encode(left.pop(0) if len(left) > 1 else left[0]))


def test_waiting_ends_in_the_awaited_phase(slept: list[float]) -> None:
    polled: list[None] = []
    with client(phases({"phase": "train"}, {"phase": "train"}, {"phase": "linked"})) as host:
        status = host.wait_for({"linked"}, seconds=60, poll=0.5, on_poll=lambda: polled.append(None))
    assert status.phase == "linked"
    assert slept == [0.5, 0.5]
    assert len(polled) == 3


def test_waiting_ends_with_the_runs_error() -> None:
    error = EnvironmentFault("enclave.died", "gone", step="train", fix="Start again.").diagnostics()
    run = phases({"phase": "train"}, {"phase": "failed", "error": error})
    with client(run) as host, refused(EnvironmentFault, "enclave.died"):
        host.wait_for({"linked"}, seconds=60)


def test_waiting_ends_when_it_takes_too_long_and_says_for_whom() -> None:
    run = phases({"phase": "approvals", "waiting_for": ["beta"]})
    with client(run) as host, refused(EnvironmentFault, "host.too-slow") as caught:
        host.wait_for({"linked"}, seconds=0)
    assert "beta" in caught.value.what


ROLES = (
    *("participant.join", "participant.seal", "participant.receive", "participant.disclose", "participant.identity"),
    *("client.ask", "auditor.bundle", "auditor.collect", "host.api", "host.server", "host.conductor", "host_client"),
)


def test_parties_users_auditors_and_the_server_start_without_torch() -> None:
    code = f"""
import importlib, sys
for name in {ROLES!r}:
    importlib.import_module("caltrain." + name)
    heavy = {{"torch", "sklearn", "pandas"}} & sys.modules.keys()
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
