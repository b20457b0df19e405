"""Downloads, against servers that are played here: nothing reaches a network."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from caltrain.errors import CaltrainError, ConfigError, DataError, EnvironmentFault, IntegrityError
from caltrain.records.readers.download import SOURCES, Remote, cache_dir, fetch

BODY = bytes(range(256)) * 20
BODIES = {f"https://example.test/files/{name}": name.encode() + BODY for name in ("one.gz", "two.gz")}
Handler = Callable[[httpx.Request], httpx.Response]


def chunks(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 1_000):
        yield body[start : start + 1_000]


def honest(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, content=chunks(BODIES[str(request.url)]))


@pytest.fixture(autouse=True)
def _two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name of mnist, two small files."""
    remotes = tuple(
        Remote(url, len(body), hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest())  # noqa: S324
        for url, body in BODIES.items()
    )
    monkeypatch.setitem(SOURCES, "mnist", remotes)


def get(folder: Path, handler: Handler) -> None:
    with httpx.Client(transport=httpx.MockTransport(handler), follow_redirects=True) as client:
        fetch("mnist", folder, client=client)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(folder: Path, handler: Handler, family: type[CaltrainError], code: str) -> CaltrainError:
    with pytest.raises(family, match=rf"^{code}: ") as caught:
        get(folder, handler)
    assert files(folder) == {}
    return caught.value


def test_files_are_kept_under_their_names_and_not_fetched_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def counted(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return honest(request)

    get(tmp_path / "new" / "mnist", counted)
    get(tmp_path / "new" / "mnist", counted)
    assert asked == list(BODIES)
    assert files(tmp_path) == {url.rpartition("/")[2]: body for url, body in BODIES.items()}


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    get(tmp_path, honest)
    (tmp_path / "one.gz").write_bytes(b"damaged")
    get(tmp_path, honest)
    assert files(tmp_path)["one.gz"] == BODIES["https://example.test/files/one.gz"]


def test_a_body_labelled_as_an_encoding_is_kept_as_it_is(tmp_path: Path) -> None:
    def labelled(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        body = chunks(BODIES[str(request.url)])
        return httpx.Response(200, headers={"content-encoding": "gzip"}, content=body)

    get(tmp_path, labelled)
    assert len(files(tmp_path)) == 2


def test_a_redirect_is_followed(tmp_path: Path) -> None:
    def moved(request: httpx.Request) -> httpx.Response:
        if request.url.host == "example.test":
            return httpx.Response(302, headers={"location": str(request.url.copy_with(host="mirror.test"))})
        return httpx.Response(200, content=chunks(BODIES[str(request.url.copy_with(host="example.test"))]))

    get(tmp_path, moved)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("change", [lambda body: body[:-1] + b"\0", lambda body: body[:-1], lambda _: b""])
def test_other_bytes_are_refused_and_not_kept(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    def forged(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=chunks(change(BODIES[str(request.url)])))

    refuse(tmp_path, forged, IntegrityError, "download.checksum")


def test_md5_alone_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SOURCES["mnist"][0]
    monkeypatch.setitem(SOURCES, "mnist", (Remote(one.url, one.size, one.md5, "0" * 64),))
    refuse(tmp_path, honest, IntegrityError, "download.checksum")


def test_an_endless_body_is_cut_off(tmp_path: Path) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(1_000)

    refuse(tmp_path, lambda _: httpx.Response(200, content=endless()), DataError, "download.too-large")
    assert sent < 2_000  # stopped a chunk after the announced size


@pytest.mark.parametrize("status", [404, 403, 500, 206])
def test_another_status_is_refused(tmp_path: Path, status: int) -> None:
    refuse(tmp_path, lambda _: httpx.Response(status, content=b"sorry"), EnvironmentFault, "download.refused")


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    def unplugged(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Name or service not known", request=request)

    error = refuse(tmp_path, unplugged, EnvironmentFault, "download.unreachable")
    assert "--data-dir" in error.fix


def test_a_connection_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        def body() -> Iterator[bytes]:
            yield BODY[:100]
            raise httpx.ReadError("connection reset", request=request)

        return httpx.Response(200, content=body())

    refuse(tmp_path, broken, EnvironmentFault, "download.unreachable")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(request: httpx.Request) -> httpx.Response:
        def body() -> Iterator[bytes]:
            yield BODY[:100]
            raise KeyboardInterrupt

        return httpx.Response(200, content=body())

    with pytest.raises(KeyboardInterrupt):
        get(tmp_path, interrupted)
    assert files(tmp_path) == {}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    refuse(tmp_path, honest, EnvironmentFault, "download.not-written")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match=r"^download\.not-written: "):
        get(tmp_path / "file" / "mnist", honest)


def test_a_set_without_an_official_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^download\.not-offered: "):
        fetch("pneumoniamnist", tmp_path)


def test_the_clients_owner_keeps_it_open(tmp_path: Path) -> None:
    with httpx.Client(transport=httpx.MockTransport(honest)) as client:
        fetch("mnist", tmp_path, client=client)
        assert not client.is_closed


def test_the_cache_follows_xdg() -> None:
    assert cache_dir({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere/caltrain/data")
    for environ in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert cache_dir(environ) == Path.home() / ".cache/caltrain/data"


def test_the_table_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real table, not the two small files
    assert {name: len(remotes) for name, remotes in SOURCES.items()} == {"cifar10": 1, "mnist": 4}
    for remote in (remote for remotes in SOURCES.values() for remote in remotes):
        assert remote.url.startswith("https://")
        assert remote.name.endswith(".gz")
        assert (len(bytes.fromhex(remote.md5)), len(bytes.fromhex(remote.sha256))) == (16, 32)
