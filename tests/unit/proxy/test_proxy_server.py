"""The proxy as a server: on this machine alone, verified before it listens, gone with the signal that ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import urllib.request
from typing import Any

import pytest

from caltrain.client.served import AsyncServedModel
from caltrain.errors import ConfigError, EnvironmentFault, IntegrityError
from caltrain.proxy.server import bind, serve
from support.samples import refused, signer
from support.scripted_served import URL, ScriptedServed, expectations, now


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_it_listens_on_this_machine(address: str) -> None:
    with bind(address, 0) as sock:
        assert sock.getsockname()[0] in {address, "127.0.0.1"}


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104  # it is refused
        "::",
        "10.0.0.1",
        "192.168.1.2",
        "",
        "example.org",
        "127.0.0.1.example.org",
        "::ffff:10.0.0.1",
    ],
)
def test_it_listens_nowhere_else(address: str) -> None:
    with refused(ConfigError, "proxy.not-loopback"):
        bind(address, 0)


def test_its_socket_is_seen_to_be_tcp_so_that_replies_are_not_held_back() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert (sock.type, sock.proto) == (socket.SOCK_STREAM, socket.IPPROTO_TCP)


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as sock, refused(EnvironmentFault, "listen.port-in-use"):
        bind("127.0.0.1", sock.getsockname()[1])


def test_a_port_that_is_none_is_named() -> None:
    with refused(EnvironmentFault, "listen.refused"):
        bind("127.0.0.1", 70_000)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ScriptedServed:
    """The host that every client reaches."""
    made = ScriptedServed()

    class Reached:
        @staticmethod
        async def connect(url: str, model: str, expected: Any, *, version: Any, clock: Any) -> AsyncServedModel:
            assert (url, model, version, clock) == (URL, "tiny", "1", now)
            return await made.connect_async(owner=expected.owner)

    monkeypatch.setattr("caltrain.proxy.server.AsyncServedModel", Reached)
    return made


def test_it_serves_until_the_signal(host: ScriptedServed) -> None:
    told: list[Any] = []

    def on_ready(simulated: bool, address: str, port: int) -> None:
        told.append((simulated, address, port))

        def ask() -> None:
            with urllib.request.urlopen(f"http://{address}:{port}/v2/models/tiny", timeout=10) as answer:
                told.append(answer.headers["caltrain-model"])
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=ask).start()

    with pytest.raises(KeyboardInterrupt):
        serve(URL, "tiny", expectations(), version="1", clock=now, on_ready=on_ready)
    assert told[0][:2] == (True, "127.0.0.1")
    assert told[1] == host.package.model
    with pytest.raises(ConnectionRefusedError), socket.create_connection(told[0][1:], timeout=5):
        pass


def test_an_enclave_that_is_refused_is_never_served(host: ScriptedServed) -> None:
    told: list[Any] = []
    expected = expectations(owner=signer("mallory").public)
    with refused(IntegrityError, "signature.invalid"):
        serve(URL, "tiny", expected, version="1", clock=now, on_ready=lambda *given: told.append(given))
    assert told == []
    assert host.posts == []


def test_a_host_that_is_not_there_is_named() -> None:
    with refused(EnvironmentFault, "host.unreachable"):
        serve("http://127.0.0.1:9", "tiny", expectations(), clock=now)


def test_nobody_is_asked_before_it_may_listen(host: ScriptedServed) -> None:
    with refused(ConfigError, "proxy.not-loopback"):
        serve(URL, "tiny", expectations(), version="1", address="10.0.0.1", clock=now)
    assert host.paths == []
