"""What a process and those below it hold in memory is read, whole and as it was at one moment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.canary_memory import Memory, arguments_of, descendants, hold, let_go, mappings, wait_until_held

PROGRAM = """
    import mmap, os, signal, sys, time

    secret, path = sys.stdin.buffer.read(32), sys.argv[1]
    own = bytearray(300_000)
    own[131_060:131_092] = secret
    across = mmap.mmap(-1, 1 << 18)
    across[(1 << 17) - 16:(1 << 17) + 16] = bytes(b ^ 15 for b in secret)  # where one piece ends and the next begins
    anonymous = mmap.mmap(-1, 1 << 18)
    anonymous[1000:1032] = secret[::-1]
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    pid = os.fork()
    if pid == 0:
        below = mmap.mmap(-1, 1 << 18)
        below[5000:5032] = bytes(b ^ 255 for b in secret)
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)
    print(pid, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    anonymous[1000:1032] = bytes(32)
    print("went on", flush=True)
    sys.stdin.read()
    os.kill(pid, signal.SIGKILL)
"""


class Holder:
    """A process that holds a secret, its child that holds another form of it."""

    def __init__(self, file: Path) -> None:
        self.secret = os.urandom(32)
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self.secret)
        self.process.stdin.flush()
        self.pid, self.child = self.process.pid, int(self.line())
        wait_until_held(self.pid)

    def line(self) -> bytes:
        """What it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """A holder that stands still."""
    file = tmp_path / "mapped"
    file.write_bytes(b"what lay in a file before" + bytes(5000))
    held = Holder(file)
    yield held
    let_go(held.pid)
    held.process.communicate(timeout=10)


def read(memory: Memory, pid: int, *, files: bool = True) -> list[bytes]:
    return [piece for _, piece in memory.read(pid, files=files)]


def contains(pieces: list[bytes], data: bytes) -> bool:
    return any(data in piece for piece in pieces)


@pytest.mark.parametrize("files", [True, False])
def test_heap_and_mappings_are_read_also_across_pieces(holder: Holder, files: bool) -> None:
    pieces = read(Memory(), holder.pid, files=files)
    assert contains(pieces, holder.secret)
    assert contains(pieces, holder.secret[::-1])
    assert contains(pieces, bytes(b ^ 15 for b in holder.secret))


def test_a_child_is_found_and_its_memory_is_its_own(holder: Holder) -> None:
    assert descendants(holder.pid) == [holder.child]
    other = bytes(b ^ 255 for b in holder.secret)
    assert contains(read(Memory(), holder.child), other)
    assert not contains(read(Memory(), holder.pid), other)


def test_only_what_is_new_is_given_again(holder: Holder) -> None:
    memory = Memory()
    first = read(memory, holder.pid)
    assert read(memory, holder.pid) == []
    let_go(holder.pid)
    assert holder.line() == b"went on\n"
    hold(holder.pid)
    again = read(memory, holder.pid)
    assert 0 < sum(map(len, again)) < sum(map(len, first)) / 2
    assert contains(first, holder.secret[::-1])
    assert not contains(again, holder.secret[::-1])


def test_an_unchanged_view_of_a_file_is_left_out(holder: Holder) -> None:
    assert any(m.path.endswith("/mapped") and m.from_file for m in mappings(holder.pid))
    assert not contains(read(Memory(), holder.pid), b"what lay in a file before" + bytes(100))


def test_a_view_that_is_not_its_file_is_given(holder: Holder, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.write_bytes(b"another file" + bytes(5000))
    changed.rename(tmp_path / "mapped")
    assert contains(read(Memory(), holder.pid), b"what lay in a file before" + bytes(100))
    assert not contains(read(Memory(), holder.pid, files=False), b"what lay in a file before" + bytes(100))


def test_only_the_kernels_own_pages_cannot_be_read(holder: Holder) -> None:
    memory = Memory()
    read(memory, holder.pid)
    assert all(path.startswith("[v") for path in memory.unreadable)


def test_a_held_process_stands_still_until_it_may_go_on(holder: Holder) -> None:
    def state() -> str:
        return Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0]

    assert state() == "T"
    let_go(holder.pid)
    assert holder.line() == b"went on\n"
    hold(holder.pid)
    assert state() == "T"


def test_waiting_for_a_process_that_does_not_stop_ends() -> None:
    with pytest.raises(TimeoutError):
        wait_until_held(os.getpid(), seconds=0.05)


def test_a_command_line_is_read_as_words(holder: Holder) -> None:
    assert arguments_of(holder.pid)[:2] == [sys.executable, "-c"]
