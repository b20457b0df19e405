"""What a party remembers of its runs: one manifest for one plan, whatever happens in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from caltrain.errors import ConfigError, EnvironmentFault, ProvisioningError
from caltrain.participant.journal import remember_manifest, signed_before
from support.disk import files_end_at, tree
from support.samples import refused


def remember(folder: Path, plan: str, manifest: str, *, allow_second: bool = False) -> None:
    """As a party does before it countersigns."""
    remember_manifest(folder, plan=plan, manifest=manifest, allow_second=allow_second)


def entries(folder: Path) -> dict[str, str]:
    """What is remembered."""
    return msgspec.json.decode((folder / "journal.json").read_bytes(), type=dict[str, str])


def test_the_same_manifest_may_be_signed_again(tmp_path: Path) -> None:
    remember(tmp_path, "plan", "one")
    remember(tmp_path, "plan", "one")
    assert entries(tmp_path) == {"plan": "one"}


def test_a_second_manifest_of_a_plan_is_refused(tmp_path: Path) -> None:
    remember(tmp_path, "plan", "one")
    before = tree(tmp_path)
    with refused(ProvisioningError, "manifest.second") as caught:
        remember(tmp_path, "plan", "two")
    assert "one" in caught.value.what
    assert "two" in caught.value.what
    assert tree(tmp_path) == before


def test_a_second_manifest_is_refused_by_another_process_too(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from caltrain.participant.journal import remember_manifest
remember_manifest(pathlib.Path(sys.argv[1]), plan="plan", manifest="one", allow_second=False)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    with refused(ProvisioningError, "manifest.second"):
        remember(tmp_path, "plan", "two")


def test_a_second_manifest_takes_the_first_ones_place_where_it_is_allowed(tmp_path: Path) -> None:
    remember(tmp_path, "plan", "one")
    remember(tmp_path, "plan", "two", allow_second=True)
    assert entries(tmp_path) == {"plan": "two"}
    with refused(ProvisioningError, "manifest.second"):
        remember(tmp_path, "plan", "one")


def test_a_plan_that_was_signed_once_is_known_before_there_is_a_manifest(tmp_path: Path) -> None:
    assert signed_before(tmp_path, plan="plan") is None
    assert tree(tmp_path) == {}
    remember(tmp_path, "plan", "one")
    assert signed_before(tmp_path, plan="another plan") is None
    assert signed_before(tmp_path, plan="plan") == "one"


def test_plans_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    remember(tmp_path, "plan", "one")
    remember(tmp_path, "another plan", "two")
    assert entries(tmp_path) == {"plan": "one", "another plan": "two"}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"plan":1}', b"\xff", b'{"a":' + b"[" * 100_000])
def test_a_damaged_journal_is_no_empty_one(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "journal.json").write_bytes(damage)
    for allow in (False, True):
        with refused(ConfigError, "journal.unreadable"):
            remember(tmp_path, "plan", "one", allow_second=allow)
    with refused(ConfigError, "journal.unreadable"):
        signed_before(tmp_path, plan="plan")
    assert tree(tmp_path) == {"journal.json": damage}


def test_a_journal_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "journal.json").mkdir()
    with refused(ConfigError, "journal.unreadable"):
        remember(tmp_path, "plan", "one")


def test_a_journal_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    remember(tmp_path, "plan", "one")
    before = tree(tmp_path)
    with files_end_at(10), refused(EnvironmentFault, "party.not-written"):
        remember(tmp_path, "another plan", "two")
    assert tree(tmp_path) == before


def test_the_note_is_on_the_disk_before_anybody_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").is_dir())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    remember(tmp_path, "plan", "one")
    assert synced == [False, True]  # the file, then the folder that names it

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fails)
    with refused(EnvironmentFault, "party.not-written"):
        remember(tmp_path, "another plan", "two")
