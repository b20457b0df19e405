"""What the host keeps: objects in one folder, written whole or not at all where they come from outside."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from caltrain.boundary.messages import StoredShard
from caltrain.errors import EnvironmentFault, ProtocolError

_PIECE = 1 << 20
_KEPT = {"shards", "incoming", "earlier", "lock"}


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


@contextmanager
def _present(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise EnvironmentFault(
            "storage.missing", f"the host has no object {name}", step="read object", fix="Send it again."
        ) from None


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Store:
    """Objects by name under `root`. Names come from typed messages or are made here; they hold no `..`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        with _disk("open storage"):
            for folder in (root / "shards", root / "incoming"):
                folder.mkdir(parents=True, exist_ok=True)

    def renew(self, *, resume: bool = False) -> None:
        """Take the folder, for as long as this process lives: for a new run, or to `resume` the one that lies there.

        For a new run, what an earlier one left goes to `earlier/N`, but for the shards, which may serve again, and the
        pool and the links, whose keys are lost. Half uploads go, and half an event.

        Raises EnvironmentFault `storage.in-use` while another process has the folder.
        """
        with _disk("open storage"):
            lock = os.open(self.root / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by the open descriptor, to the process's end
            except BlockingIOError:
                os.close(lock)
                raise EnvironmentFault(
                    "storage.in-use",
                    f"another host serves from {self.root}",
                    step="open storage",
                    fix="Choose another --folder, or stop that host.",
                ) from None
            for dead in self.root.glob("incoming/*"):
                dead.unlink()
            if resume:
                self._drop_torn_line()
                return
            for dead in self._own_objects():
                dead.unlink()
            if (self.root / "chain.jsonl").exists():
                self._set_aside()

    def _drop_torn_line(self) -> None:
        """A host that was killed while it wrote an event has half of it: nobody has seen that one."""
        chain = self.root / "chain.jsonl"
        if chain.exists():
            raw = chain.read_bytes()
            with chain.open("r+b") as file:
                file.truncate(raw.rfind(b"\n") + 1)

    def _set_aside(self) -> None:
        earlier = self.root / "earlier"
        earlier.mkdir(exist_ok=True)
        aside = earlier / str(sum(1 for _ in earlier.iterdir()))
        aside.mkdir()
        for path in self.root.iterdir():
            if path.name not in _KEPT:
                path.rename(aside / path.name)

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
        with _disk(f"read {name}"), _present(name), self.path(name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def read_whole(self, name: str) -> bytes:
        """A whole object. Raises EnvironmentFault `storage.missing`."""
        with _disk(f"read {name}"), _present(name):
            return self.path(name).read_bytes()

    def snapshot(self, name: str, *, offset: int = 0) -> tuple[int, Iterator[bytes]]:
        """Size and bytes of an object as it is now, from `offset` on; what is appended meanwhile is left out."""
        with _disk(f"read {name}"), _present(name), self._lock:
            end = self.path(name).stat().st_size

        def pieces() -> Iterator[bytes]:
            for start in range(offset, end, _PIECE):
                yield self.read(name, offset=start, length=min(_PIECE, end - start))

        return max(0, end - offset), pieces()

    def write(self, name: str, data: bytes, *, offset: int, durable: bool = False) -> None:
        """Write into a growing object of the enclave's (its pool). If `durable`, it outlasts a power failure."""
        with _disk(f"write {name}"):
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                _write_all(fd, data, offset)
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            if durable:
                _sync_folder(path.parent)

    def sync(self) -> None:
        """Have what the enclave wrote for itself (its pools, checkpoints and links) outlast a power failure."""
        with _disk("write to disk"):
            for path in self._own_objects():
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def _own_objects(self) -> Iterator[Path]:
        for prefix in ("pool", "held-out", "checkpoint", "linkage"):
            yield from self.root.glob(f"{prefix}-*")

    def put(self, name: str, data: bytes) -> None:
        """Store a whole object: it appears complete or not at all."""
        with self.incoming() as file:
            file.write(data)
            self.publish(file, name)

    def append_line(self, name: str, line: bytes, *, durable: bool = False) -> None:
        """Add a line to a log: all of it, or nothing. If `durable`, it outlasts a power failure."""
        with _disk(f"append to {name}"), self._lock, self.path(name).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                _write_all(file.fileno(), line + b"\n", end)
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

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
            _sync_folder(target.parent)

    def shard_ids(self, party: str) -> set[str]:
        """Ids of the shards of one contributor."""
        return {path.name for path in self.path(f"shards/{party}").glob("*")}

    def shards(self) -> tuple[StoredShard, ...]:
        """All shards, by contributor and id."""
        found = sorted(self.root.glob("shards/*/*"))
        return tuple(StoredShard(path.parent.name, path.name) for path in found)
