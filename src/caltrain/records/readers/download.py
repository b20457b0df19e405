"""Public data sets from their official places: bounded, checked, and only then under their final name."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from caltrain.errors import ConfigError, DataError, EnvironmentFault, IntegrityError

_STEP = "download"
_CHUNK = 1 << 20
_FIX_BY_HAND = "Check the network, or get the file on another machine and pass its folder with --data-dir."
_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Remote:
    """One file: where it is, its length in bytes, and its digests in hex.

    MD5 is what the publishers state and no protection against a forger; SHA-256 is what TensorFlow
    Datasets and others recorded for the same files. Both must match.
    """

    url: str
    size: int
    md5: str
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file in the cache."""
        return self.url.rpartition("/")[2]


SOURCES: dict[str, tuple[Remote, ...]] = {
    "cifar10": (
        Remote(
            f"{_CIFAR}cifar-10-binary.tar.gz",
            170_052_171,
            "c32a1d4ab5d03f1284b67883e8d87530",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    "mnist": (
        Remote(
            f"{_MNIST}train-images-idx3-ubyte.gz",
            9_912_422,
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Remote(
            f"{_MNIST}train-labels-idx1-ubyte.gz",
            28_881,
            "d53e105ee54ea40749a09fcbcd1e9432",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Remote(
            f"{_MNIST}t10k-images-idx3-ubyte.gz",
            1_648_877,
            "9fb629c4189551a2d022fa330f9573f3",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Remote(
            f"{_MNIST}t10k-labels-idx1-ubyte.gz",
            4_542,
            "ec29112dd5afa0611ce80d1b7f02629c",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
}


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where downloads are kept (XDG Base Directory Specification 0.8: a relative path is ignored)."""
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "caltrain" / "data"


def fetch(name: str, folder: Path, *, client: httpx.Client | None = None) -> None:
    """Bring all files of the data set `name` into `folder`; those that are there and sound are kept.

    Raises ConfigError (nothing to download under that name), EnvironmentFault (no network, no space),
    DataError (longer than it should be) or IntegrityError (other bytes); then nothing new is in `folder`
    but files that were verified.
    """
    remotes = SOURCES.get(name)
    if remotes is None:
        raise ConfigError(
            "download.not-offered",
            f"there is no official place to download {name} from",
            step=_STEP,
            fix=f"Get it yourself and pass its folder; downloads exist for {', '.join(sorted(SOURCES))}.",
        )
    session = httpx.Client(follow_redirects=True, timeout=30) if client is None else nullcontext(client)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with session as opened:
            for remote in remotes:
                if _digests(folder / remote.name) != (remote.md5, remote.sha256):
                    _fetch_one(opened, remote, folder)
    except OSError as error:
        raise EnvironmentFault(
            "download.not-written",
            f"{folder} cannot be used: {error.strerror or error}",
            step=_STEP,
            fix="Free some space, or name another folder with --data-dir or XDG_CACHE_HOME.",
        ) from error


def _digests(path: Path) -> tuple[str, str] | None:
    """(MD5, SHA-256) of a file in hex; None where there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        file.seek(0)
        return md5.hexdigest(), hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_one(session: httpx.Client, remote: Remote, folder: Path) -> None:
    """Into a temporary file of the same folder, verified, then renamed; on any error it is removed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{remote.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _stream(session, remote, file)
            file.flush()
            os.fsync(file.fileno())
        _verify(remote, temporary)
        temporary.replace(folder / remote.name)
    finally:
        temporary.unlink(missing_ok=True)


def _stream(session: httpx.Client, remote: Remote, file: IO[bytes]) -> None:
    """The raw body into `file`. Not decoded: a server that labels a .gz as an encoding would change it."""
    try:
        with session.stream("GET", remote.url, headers={"Accept-Encoding": "identity"}) as response:
            if response.status_code != httpx.codes.OK:
                raise EnvironmentFault(
                    "download.refused",
                    f"{remote.url} answered with the status {response.status_code}",
                    step=_STEP,
                    fix=_FIX_BY_HAND,
                )
            _copy(response.iter_raw(_CHUNK), remote, file)
    except httpx.HTTPError as error:
        raise EnvironmentFault(
            "download.unreachable",
            f"{remote.url} could not be read: {type(error).__name__}: {error}",
            step=_STEP,
            fix=_FIX_BY_HAND,
        ) from error


def _copy(chunks: Iterable[bytes], remote: Remote, file: IO[bytes]) -> None:
    left = remote.size
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise DataError(
                "download.too-large",
                f"{remote.url} sends more than the {remote.size} bytes of {remote.name}",
                step=_STEP,
                fix=_FIX_BY_HAND,
            )
        file.write(chunk)


def _verify(remote: Remote, path: Path) -> None:
    """Raise IntegrityError unless the bytes at `path` are the published ones."""
    digests = _digests(path)
    if digests != (remote.md5, remote.sha256):
        raise IntegrityError(
            "download.checksum",
            f"{remote.url} sent other bytes than were published: (MD5, SHA-256) is {digests}",
            step=_STEP,
            fix="Nothing was kept. Try again; if it stays so, the network or the server changes the file.",
        )
