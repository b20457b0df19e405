"""Writing into a party's folder: whole or not at all, and for its owner's eyes alone."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from caltrain.errors import EnvironmentFault


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            "party.not-written",
            f"cannot write {path}: {error.strerror}",
            step="write into the party's folder",
            fix="Free space, or look at the folder's rights; then try again.",
        ) from error


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file (mode 0600) that gets its name once it is complete and on the disk; otherwise it vanishes.

    Raises EnvironmentFault `party.not-written`.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with _writing(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            temporary.rename(path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Write a whole file at once, as `whole_file` does."""
    with whole_file(path) as out:
        out.write(data)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the folder (mode 0700) if need be, and wait until nobody else is inside such a block with it."""
    with _writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
