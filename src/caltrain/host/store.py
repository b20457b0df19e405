"""What the host keeps: objects in one folder, written whole or not at all where they come from outside."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from caltrain.boundary.messages import StoredShard
from caltrain.errors import EnvironmentFault, ProtocolError


@contextmanager
def _disk(step: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise EnvironmentFault(
            "storage.full" if full else "storage.failed",
            f"the host's storage {'is full' if full else f'failed: {error.strerror}'}",
            step=step,
            fix="Free space on the host's disk, then try again." if full else "Look at the host's disk and its rights.",
        ) from error


class Store:
    """Objects by name under `root`. Names come from typed messages or are made here; they hold no `..`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        with _disk("open storage"):
            for folder in (root / "shards", root / "incoming"):
                folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where an object lies. Raises ProtocolError for a name that leaves the folder."""
        path = self.root / name
        if ".." in path.parts or not path.is_relative_to(self.root):
            raise ProtocolError(
                "storage.name", f"no object may be called {name[:80]!r}", step="name object", fix="Stop the run."
            )
        return path

    def read(self, name: str, *, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset`. Raises EnvironmentFault `storage.missing`."""
        try:
            with self.path(name).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError:
            raise EnvironmentFault(
                "storage.missing", f"the host has no object {name}", step="read object", fix="Send it again."
            ) from None

    def write(self, name: str, data: bytes, *, offset: int) -> None:
        """Write into a growing object of the enclave's (its pool)."""
        with _disk(f"write {name}"):
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                view = memoryview(data)
                while view:
                    written = os.pwrite(fd, view, offset)
                    view, offset = view[written:], offset + written
            finally:
                os.close(fd)

    def put(self, name: str, data: bytes) -> None:
        """Store a whole object: it appears complete or not at all."""
        with self.incoming() as file:
            file.write(data)
            self.publish(file, name)

    def append_line(self, name: str, line: bytes) -> None:
        """Add a line to a log."""
        with _disk(f"append to {name}"), self._lock, self.path(name).open("ab") as file:
            file.write(line + b"\n")

    @contextmanager
    def incoming(self) -> Iterator[BinaryIO]:
        """A file that vanishes unless it is published."""
        path = self.root / "incoming" / uuid.uuid4().hex
        try:
            with _disk("store upload"), path.open("xb") as file:
                yield file
        finally:
            path.unlink(missing_ok=True)

    def publish(self, file: BinaryIO, name: str) -> None:
        """Give a finished incoming file its name, durably."""
        with _disk(f"store {name}"):
            file.flush()
            os.fsync(file.fileno())
            target = self.path(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(file.name).rename(target)

    def shards(self) -> tuple[StoredShard, ...]:
        """All shards, by contributor and id."""
        found = sorted(self.root.glob("shards/*/*"))
        return tuple(StoredShard(path.parent.name, path.name) for path in found)
