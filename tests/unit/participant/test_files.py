"""Writing into a party's folder."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from caltrain.errors import EnvironmentFault
from caltrain.participant.files import alone, whole_file, write_whole
from support.disk import files_end_at, small_disk, tree
from support.samples import refused


def test_a_file_appears_whole_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model"
    with whole_file(path) as out:
        out.write(b"model")
        out.flush()
        assert not path.exists()
    assert path.read_bytes() == b"model"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert set(tree(tmp_path)) == {"runs/model"}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    write_whole(tmp_path / "file", b"new")
    assert tree(tmp_path) == {"file": b"new"}


def test_whatever_interrupts_the_writing_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")

    def interrupted() -> None:
        with whole_file(tmp_path / "file") as out:
            out.write(b"half of the n")
            out.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tree(tmp_path) == {"file": b"old"}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with files_end_at(10), refused(EnvironmentFault, "party.not-written") as caught:
        write_whole(tmp_path / "file", bytes(20))
    assert os.strerror(errno.EFBIG) in caught.value.what
    assert tree(tmp_path) == {"file": b"old"}


def test_a_disk_that_is_really_full_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        write_whole(disk / "file", b"old")
        with refused(EnvironmentFault, "party.not-written"):
            write_whole(disk / "file", bytes(100 << 10))
        assert tree(disk) == {"file": b"old"}


def test_what_is_not_on_the_disk_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fails)
    with refused(EnvironmentFault, "party.not-written"):
        write_whole(tmp_path / "file", b"new")
    assert tree(tmp_path) == {}


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    with refused(EnvironmentFault, "party.not-written"):
        write_whole(tmp_path / "file" / "below", b"new")
    with refused(EnvironmentFault, "party.not-written"), alone(tmp_path / "file"):
        pytest.fail("there is no folder to be alone in")
    assert tree(tmp_path) == {"file": b"old"}


def test_two_processes_are_not_in_one_block_at_once(tmp_path: Path) -> None:
    code = """
import pathlib, sys, time
from caltrain.participant.files import alone
with alone(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    order: list[str] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"

        def enter() -> None:
            with alone(tmp_path):
                order.append("we")

        waiting = threading.Thread(target=enter)
        waiting.start()
        time.sleep(0.2)
        order.append("the other one ends")
        other.stdin.write("\n")
        other.stdin.flush()
        waiting.join(20)
    assert order == ["the other one ends", "we"]
