"""The memory of processes as their owner can read it: `/proc/PID/mem` over `/proc/PID/maps` (proc(5))."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 17
OVERLAP = 4096  # pieces overlap by this, so that no needle is cut in two


@dataclass(frozen=True)
class Mapping:
    """One line of `/proc/PID/maps`: addresses, rights (`rw-p`), what is mapped and from which offset of it."""

    start: int
    stop: int
    rights: str
    offset: int
    path: str

    @property
    def from_file(self) -> bool:
        """Whether it is a view of a file that this process may not write into, neither there nor here."""
        return self.path.startswith("/") and "w" not in self.rights and not self.path.startswith("/memfd:")


class Memory:
    """Pieces of memory as they were at some moments, each content once."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self.unreadable: set[str] = set()

    def read(self, pid: int, *, files: bool) -> Iterator[tuple[str, bytes]]:
        """(where, bytes) of all that is readable and was not so before; read-only views of files if `files`.

        A view that equals its file is left out: that file was there before the process.
        """
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for mapping in mappings(pid):
                if mapping.from_file and not files:
                    continue
                for address, piece in self._pieces(memory, mapping):
                    digest = hashlib.sha256(piece).digest()
                    if digest not in self._seen:
                        self._seen.add(digest)
                        yield f"{mapping.path or 'anonymous'} at {address:x}", piece

    def _pieces(self, memory: BinaryIO, mapping: Mapping) -> Iterator[tuple[int, bytes]]:
        for address in range(mapping.start, mapping.stop, _PIECE):
            length = min(_PIECE + OVERLAP, mapping.stop - address)
            try:
                memory.seek(address)
                piece = memory.read(length)
            except (OSError, OverflowError):  # no page behind it: a guard, a device, [vvar]
                self.unreadable.add(mapping.path or "anonymous")
                continue
            if not (mapping.from_file and _is_in_file(mapping, address, piece)):
                yield address, piece


def _is_in_file(mapping: Mapping, address: int, piece: bytes) -> bool:
    try:
        with Path(mapping.path).open("rb") as file:
            file.seek(mapping.offset + address - mapping.start)
            return file.read(len(piece)).ljust(len(piece), b"\0") == piece  # a last page is filled up with zeros
    except OSError:
        return False


def mappings(pid: int) -> list[Mapping]:
    """What `pid` has mapped and may read."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights, offset, _device, _inode, *path = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        found.append(Mapping(start, stop, rights, int(offset, 16), path[0] if path else ""))
    return [mapping for mapping in found if "r" in mapping.rights]


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def arguments_of(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]


def hold(pid: int) -> None:
    """Stop a process and wait until all of it stands still; `let_go` continues it."""
    os.kill(pid, signal.SIGSTOP)
    wait_until_held(pid)


def wait_until_held(pid: int, *, seconds: float = 30) -> None:
    """Wait until a process that is being stopped, also by itself, stands still."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not stop")
        time.sleep(0.01)


def let_go(pid: int) -> None:
    """Let a held process go on."""
    os.kill(pid, signal.SIGCONT)
