"""Files that people give and keep: bounded when read, whole when written."""

from __future__ import annotations

from pathlib import Path

import pytest

from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.files import read_bounded, write_whole


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, limit=5) == b"12345"
    with pytest.raises(ConfigError, match=r"^file\.too-large: .*more than 4 bytes"):
        read_bounded(path, limit=4)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match=rf"^file\.unreadable: cannot read {path}"):
            read_bounded(path, limit=5)


def test_a_file_is_written_with_its_folders_and_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for data in (b"one", b"2"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert [found.name for found in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("failing", ["write_bytes", "rename"])
def test_a_failure_leaves_the_former_file_and_no_half_of_the_new_one(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"former")
    write = Path.write_bytes

    def full(self: Path, *_: object) -> int:
        write(self, b"ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, failing, full)
    with pytest.raises(EnvironmentFault, match=r"^file\.not-written: .*No space left on device"):
        write_whole(path, b"half of it")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"former"


def test_an_interrupt_leaves_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def interrupted(self: Path, *_: object) -> int:
        write(self, b"ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"half of it")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match=r"^file\.not-written: "):
        write_whole(tmp_path / "file" / "below", b"x")
