"""Starting and ending a serving host; what its enclaves may read."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import CallFailed, Data, Failed, Read, Ready, Stop, Write
from caltrain.boundary.serving import SERVING_REQUESTS, LoadPackage
from caltrain.crypto.dsse import SigningKey
from caltrain.errors import AttestationError, ConfigError
from caltrain.host.serving import heads, launch
from caltrain.host.serving.app import create_app
from caltrain.host.serving.launch import answer
from caltrain.host.serving.metrics import Metrics
from caltrain.host.serving.registry import Registry
from caltrain.host.serving.server import _Server, serve
from caltrain.listening import bind
from support.asgi import call
from support.samples import refused
from support.serving_host import Ended, door, tiny_folder


def _never() -> None:
    pytest.fail("said to be served")


def test_a_folder_that_holds_no_package_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    with refused(ConfigError, "file.unreadable"):
        serve([tmp_path], root=SigningKey(), sock=(sock := bind("127.0.0.1", 0)), threads=1, on_ready=_never)
    assert sock.fileno() == -1


def test_it_is_ready_once_the_folders_are_checked_and_before_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tiny_folder(tmp_path / "one").folder, list[str]()
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: seen.append("serves"))
    with bind("127.0.0.1", 0) as sock:
        serve([folder], root=SigningKey(), sock=sock, threads=1, on_ready=lambda: seen.append("ready"))
    assert seen == ["ready", "serves"]


def test_the_server_starts_without_torch() -> None:
    program = "import sys, caltrain.host.serving.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def _nobody(*_: Any) -> Any:
    raise AssertionError


def test_the_first_signal_drains_and_the_second_does_not_wait() -> None:
    async def play() -> None:
        registry = Registry([], _nobody)
        server = _Server(uvicorn.Config(create_app(registry, Metrics())), registry)
        server.listen_for_hangup()
        with registry.request():
            server.handle_exit(signal.SIGTERM, None)
            await asyncio.sleep(0.02)
            assert (registry.draining, server.should_exit) == (True, False)
        await asyncio.sleep(0.02)
        assert server.should_exit
        again = _Server(uvicorn.Config(create_app(registry, Metrics())), registry := Registry([], _nobody))
        again.listen_for_hangup()
        with registry.request():
            again.handle_exit(signal.SIGTERM, None)
            again.handle_exit(signal.SIGTERM, None)
            assert again.should_exit
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)

    asyncio.run(play())


def test_without_a_model_it_is_not_ready_and_an_upload_that_breaks_off_is_named() -> None:
    app = create_app(Registry([], _nobody), Metrics())
    got = call(app, "GET", "/v2/health/ready")
    assert got.status == 503
    assert b'"serving.starting"' in got.body
    assert call(app, "GET", "/v2/health/live").status == 200


def test_an_enclave_reads_the_two_parts_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"0123456789")
    with (tmp_path / "part").open("rb") as part:
        parts = {"inside.sealed": part}
        assert answer(parts, Read("inside.sealed", 2, 3)) == Data(b"234")
        assert answer(parts, Read("inside.sealed", 8, 9)) == Data(b"89")
        for wrong in (Read("package.json", 0, 1), Read("a/../part", 0, 1), Write("inside.sealed", 0, b"x")):
            failed = answer(parts, wrong)
            assert isinstance(failed, CallFailed)
            assert failed.error["code"] == "storage.not-a-part"
    assert (tmp_path / "part").read_bytes() == b"0123456789"


def test_a_package_that_the_enclave_refuses_is_named_and_the_program_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = door()
    program = Ended(theirs)
    ready = Ready("sha384:" + "0" * 96, simulated=True, sandbox={})
    monkeypatch.setattr(launch, "start_program", lambda *_, **__: (program, Channel(ours), ready))
    no = AttestationError("evidence.not-the-packages", "no", step="load package", fix="Package it anew.")

    def play() -> None:
        end = Channel(theirs)
        assert isinstance(end.receive(SERVING_REQUESTS), LoadPackage)
        end.send(Failed(no.diagnostics(), fatal=False))
        assert end.receive(SERVING_REQUESTS) == Stop()
        end.close()

    enclave = threading.Thread(target=play)
    enclave.start()
    made = launch.Launcher(tiny_folder(tmp_path), root_secret=bytes(32), threads=1)
    with refused(AttestationError, "evidence.not-the-packages"):
        made(lambda: None)
    enclave.join(20)
    assert not enclave.is_alive()
    assert program.killed
    made.close()


class Patient:
    """A server on a socket whose heads are due in a tenth of a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(heads, "HEAD_SECONDS", 0.1)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = await receive()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": str(len(body["body"])).rjust(2).encode()})

        config = uvicorn.Config(
            app, http=heads.PatientProtocol, lifespan="off", log_level="error", timeout_keep_alive=60
        )
        self.server, self.sock = uvicorn.Server(config), bind("127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.sock]}, daemon=True)

    def __enter__(self) -> Patient:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.sock.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.sock.getsockname(), timeout=10)


def whole(client: socket.socket) -> bytes:
    """An answer, whose body has two bytes."""
    got = b""
    while b"\r\n\r\n" not in got or len(got.partition(b"\r\n\r\n")[2]) < 2:
        got += client.recv(1000)
    return got


HEAD = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", HEAD[:20]])
def test_who_sends_no_whole_head_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with Patient(monkeypatch) as patient, patient.connect() as client:
        client.sendall(sent)
        assert client.recv(100) == b""


def test_who_begins_another_request_and_stops_is_cut_off_and_who_is_quick_or_waits_between_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Patient(monkeypatch) as patient, patient.connect() as client:
        for _ in range(2):
            client.sendall(HEAD)
            time.sleep(0.3)  # the body is late: that is another time-out's business
            client.sendall(b"x")
            assert whole(client).endswith(b" 1")
            time.sleep(0.3)  # between requests a connection may rest
        client.sendall(HEAD[:30])
        assert client.recv(100) == b""
