"""Starting the server: addresses that cannot be had, folders that cannot be used."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from caltrain.crypto.dsse import SigningKey
from caltrain.errors import CaltrainError, EnvironmentFault, ProtocolError
from caltrain.host.server import serve
from caltrain.host.store import Store
from caltrain.listening import bind
from support.disk import tree
from support.samples import plan, refused


def test_port_zero_takes_a_free_one() -> None:
    with bind("127.0.0.1", 0) as one, bind("127.0.0.1", 0) as other:
        assert one.getsockname()[1] != other.getsockname()[1] != 0


def test_a_port_in_use_is_named() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with refused(EnvironmentFault, "listen.port-in-use") as caught:
            bind("127.0.0.1", port)
    assert str(port) in caught.value.what
    with bind("127.0.0.1", port):
        pass


@pytest.mark.parametrize(
    ("address", "port"),
    [("192.0.2.1", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 70_000), ("127.0.0.1", -1), ("::zz", 0)],
)
def test_an_address_that_is_not_ours_has_another_code_than_a_port_in_use(address: str, port: int) -> None:
    with refused(EnvironmentFault, "listen.refused"):
        bind(address, port)


def test_the_version_of_ip_follows_the_address() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        with bind("::1", 0) as sock:
            assert sock.family is socket.AF_INET6
    except EnvironmentFault as error:
        pytest.skip(f"no IPv6 here: {error.what}")


def test_a_folder_that_another_host_has_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.renew()
    store.put("chain.jsonl", b"of the first host")
    before = tree(tmp_path)
    with bind("127.0.0.1", 0) as sock, refused(EnvironmentFault, "storage.in-use"):
        serve(plan(), folder=tmp_path, sock=sock, root=SigningKey(), auto_start=True)
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with bind("127.0.0.1", 0) as sock, refused(EnvironmentFault, "storage.failed"):
        serve(plan(), folder=tmp_path / "file", sock=sock, root=SigningKey(), auto_start=True)


def _never() -> None:
    pytest.fail("said to be served")


@pytest.mark.parametrize("kept", [(), ("chain.jsonl",), ("checkpoint-0",)])
def test_nothing_is_made_in_a_folder_without_a_run_to_resume(tmp_path: Path, kept: tuple[str, ...]) -> None:
    folder = tmp_path / "host"
    for name in kept:
        folder.mkdir()
        (folder / name).write_bytes(b"")
    with bind("127.0.0.1", 0) as sock, refused(ProtocolError, "resume.nothing"):
        serve(plan(), folder=folder, sock=sock, root=SigningKey(), auto_start=True, resume=True, on_ready=_never)
    assert tree(tmp_path) == {f"host/{name}": b"" for name in kept}
    assert folder.exists() == bool(kept)


def test_it_is_ready_once_the_folder_is_taken_and_before_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(_server: uvicorn.Server, **_: Any) -> None:
        seen.append("serves")

    def on_ready() -> None:
        try:
            Store(tmp_path).renew()
        except CaltrainError as error:
            seen.append(error.code)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    with bind("127.0.0.1", 0) as sock:
        serve(plan(), folder=tmp_path, sock=sock, root=SigningKey(), auto_start=True, on_ready=on_ready)
    assert seen == ["storage.in-use", "serves"]


def test_a_folder_that_is_refused_is_not_said_to_be_served(tmp_path: Path) -> None:
    Store(tmp_path).renew()
    with bind("127.0.0.1", 0) as sock, refused(EnvironmentFault, "storage.in-use"):
        serve(plan(), folder=tmp_path, sock=sock, root=SigningKey(), auto_start=True, on_ready=_never)
