"""The host's storage: whole or not at all, inside its folder, and full disks by name."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from caltrain.boundary.messages import StoredShard
from caltrain.errors import EnvironmentFault, ProtocolError
from caltrain.host.store import Store
from support.disk import files_end_at, small_disk, tree
from support.samples import refused


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "host")


def fail(*_: object, number: int = errno.EIO) -> int:
    """What the kernel answers on a broken disk."""
    raise OSError(number, os.strerror(number))


def no_space(*_: object) -> int:
    """What the kernel answers on a full disk."""
    return fail(number=errno.ENOSPC)


def test_a_durable_write_is_on_the_disk_with_its_name_before_it_is_answered(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []  # whether it was a folder
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    store.write("linkage-0-0", b"ab", offset=0)
    assert synced == []
    store.write("linkage-0-0", b"cd", offset=2, durable=True)
    assert synced == [False, True]
    assert store.read_whole("linkage-0-0") == b"abcd"


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/outside", "shards/../../outside", ".."])
def test_no_name_leads_out_of_the_folder(store: Store, tmp_path: Path, name: str) -> None:
    before = tree(tmp_path)
    for action in (
        lambda: store.put(name, b"x"),
        lambda: store.write(name, b"x", offset=0),
        lambda: store.append_line(name, b"x"),
        lambda: store.read(name, offset=0, length=1),
        lambda: store.snapshot(name),
    ):
        with refused(ProtocolError, "storage.name"):
            action()
    assert tree(tmp_path) == before


def test_an_object_is_read_back_in_parts(store: Store) -> None:
    store.put("release/alpha", b"0123456789")
    assert store.read("release/alpha", offset=2, length=3) == b"234"
    assert store.read("release/alpha", offset=8, length=5) == b"89"
    assert store.read("release/alpha", offset=10, length=5) == b""


def test_a_missing_object_is_named(store: Store) -> None:
    for action in (lambda: store.read("center", offset=0, length=1), lambda: store.snapshot("center")):
        with refused(EnvironmentFault, "storage.missing") as caught:
            action()
        assert "center" in caught.value.what


def test_what_is_no_file_is_a_named_error(store: Store) -> None:
    with refused(EnvironmentFault, "storage.failed"):
        store.read("shards", offset=0, length=1)


def test_a_folder_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with refused(EnvironmentFault, "storage.failed"):
        Store(tmp_path / "file")


def test_the_pool_grows_at_any_offset_even_where_the_kernel_takes_little_at_a_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, bytes(data[:3]), offset))
    store.write("pool-0", b"cdefgh", offset=2)
    store.write("pool-0", b"ab", offset=0)
    assert store.read("pool-0", offset=0, length=9) == b"abcdefgh"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_has_a_code_of_its_own(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: fail(number=number))
    with refused(EnvironmentFault, "storage.full"):
        store.write("pool-0", b"x", offset=0)


def test_a_broken_disk_is_not_called_full(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", fail)
    with refused(EnvironmentFault, "storage.failed") as caught:
        store.write("pool-0", b"x", offset=0)
    assert os.strerror(errno.EIO) in caught.value.what


def test_an_object_that_the_disk_cannot_take_does_not_appear(store: Store) -> None:
    before = tree(store.root)
    with files_end_at(1000), refused(EnvironmentFault, "storage.full"):
        store.put("release/alpha", bytes(2000))
    assert tree(store.root) == before
    store.put("release/alpha", bytes(2000))
    assert store.snapshot("release/alpha")[0] == 2000


def test_an_object_that_is_not_safe_on_the_disk_does_not_appear(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail)
    with refused(EnvironmentFault, "storage.failed"):
        store.put("release/alpha", b"x")
    assert tree(store.root) == {}


def test_an_object_is_replaced_whole_or_stays(store: Store) -> None:
    store.put("center", b"old")
    with files_end_at(10), refused(EnvironmentFault, "storage.full"):
        store.put("center", bytes(20))
    assert store.read("center", offset=0, length=9) == b"old"
    store.put("center", b"new")
    assert store.read("center", offset=0, length=9) == b"new"


def test_an_incoming_file_that_is_not_published_vanishes(store: Store) -> None:
    with store.incoming() as file:
        file.write(b"half")
        file.flush()
        assert list(tree(store.root).values()) == [b"half"]
    assert tree(store.root) == {}


def test_a_line_that_the_disk_cannot_take_leaves_the_log_as_it_was(store: Store) -> None:
    store.append_line("chain.jsonl", b"first")
    with files_end_at(20), refused(EnvironmentFault, "storage.full"):
        store.append_line("chain.jsonl", b"a line that does not fit")
    assert tree(store.root) == {"chain.jsonl": b"first\n"}
    store.append_line("chain.jsonl", b"second")
    assert tree(store.root) == {"chain.jsonl": b"first\nsecond\n"}


def test_on_a_disk_that_is_really_full_nothing_half_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kilobytes=256) as disk:
        store = Store(disk / "host")
        store.append_line("chain.jsonl", b"first")
        before = tree(store.root)
        with refused(EnvironmentFault, "storage.full"):
            store.put("release/alpha", bytes(300 << 10))
        with refused(EnvironmentFault, "storage.full"):
            store.append_line("chain.jsonl", bytes(300 << 10))
        assert tree(store.root) == before
        with refused(EnvironmentFault, "storage.full"):
            store.write("pool-0", bytes(300 << 10), offset=0)


def test_a_snapshot_holds_what_was_there_and_not_what_came_after(store: Store) -> None:
    store.append_line("chain.jsonl", bytes(3 << 20))
    size, pieces = store.snapshot("chain.jsonl")
    store.append_line("chain.jsonl", b"later")
    assert (size, sum(len(piece) for piece in pieces)) == ((3 << 20) + 1, (3 << 20) + 1)


def test_shards_are_listed_by_contributor_and_id(store: Store) -> None:
    for name in ("beta/02", "alpha/03", "alpha/01"):
        store.put(f"shards/{name}", b"x")
    assert store.shards() == (StoredShard("alpha", "01"), StoredShard("alpha", "03"), StoredShard("beta", "02"))
    assert store.shard_ids("alpha") == {"01", "03"}
    assert store.shard_ids("gamma") == set()


@pytest.mark.parametrize(("offset", "rest"), [(0, b"0123"), (3, b"3"), (4, b""), (9, b"")])
def test_a_snapshot_may_begin_where_somebody_stopped_reading(store: Store, offset: int, rest: bytes) -> None:
    store.put("log.jsonl", b"0123")
    size, pieces = store.snapshot("log.jsonl", offset=offset)
    assert (size, b"".join(pieces)) == (len(rest), rest)


LEFT = ("chain.jsonl", "manifest.json", "release/alpha", "countersignatures/alpha.json", "enclave.log")


def renewed_elsewhere(folder: Path) -> None:
    """A process of its own takes the folder, and ends."""
    code = "import pathlib, sys; from caltrain.host.store import Store; Store(pathlib.Path(sys.argv[1])).renew()"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)


def test_a_new_run_finds_the_shards_and_nothing_else_of_an_earlier_one(tmp_path: Path) -> None:
    for number in range(2):
        renewed_elsewhere(tmp_path)
        lost = ("pool-0", "pool-cells", "held-out-0", "checkpoint-0", "checkpoint-1", "linkage-0-0", "linkage-0-0-rows")
        for name in (*LEFT, "shards/alpha/01", "incoming/half", *lost):
            Store(tmp_path).put(name, b"%d" % number)
    renewed_elsewhere(tmp_path)
    aside = {f"earlier/{number}/{name}": b"%d" % number for number in range(2) for name in LEFT}
    assert tree(tmp_path) == {"lock": b"", "shards/alpha/01": b"1"} | aside


def test_a_run_that_never_began_is_not_set_aside(store: Store) -> None:
    store.put("plan.json", b"{}")
    store.renew()
    assert tree(store.root) == {"lock": b"", "plan.json": b"{}"}


def test_two_hosts_cannot_have_one_folder(store: Store) -> None:
    store.renew()
    store.put("chain.jsonl", b"of the first host")
    before = tree(store.root)
    with refused(EnvironmentFault, "storage.in-use"):
        Store(store.root).renew()
    assert tree(store.root) == before


# -- a run that is taken up ------------------------------------------------------------------------------------------

WHOLE = b'{"first":1}\n{"second":2}\n'


def test_to_take_up_a_run_keeps_all_of_it_but_half_uploads(store: Store) -> None:
    kept = (*LEFT, "shards/alpha/01", "pool-0", "held-out-1", "checkpoint-0", "center-at-1-0", "center", "plan.json")
    for name in kept:
        store.put(name, WHOLE)
    before = tree(store.root)
    store.put("incoming/half", b"x")
    store.renew(resume=True)
    assert tree(store.root) == before | {"lock": b""}


@pytest.mark.parametrize(
    ("lies", "stays"),
    [
        (WHOLE, WHOLE),
        (WHOLE + b"{", WHOLE),
        (WHOLE + b'{"third":3}', WHOLE),
        (WHOLE + b"\n", WHOLE + b"\n"),
        (b'{"first', b""),
        (b"", b""),
    ],
)
def test_a_line_that_was_torn_is_dropped_and_no_other(store: Store, lies: bytes, stays: bytes) -> None:
    store.put("chain.jsonl", lies)
    store.put("log", b"of somebody else, without a line end")
    store.renew(resume=True)
    assert tree(store.root) == {"lock": b"", "chain.jsonl": stays, "log": b"of somebody else, without a line end"}


def test_a_folder_without_a_run_is_left_as_it_is(store: Store) -> None:
    store.renew(resume=True)
    assert tree(store.root) == {"lock": b""}


def test_a_run_that_another_host_serves_is_not_taken_up(store: Store) -> None:
    store.renew()
    store.put("chain.jsonl", WHOLE + b"torn")
    store.put("incoming/upload", b"on its way")
    before = tree(store.root)
    with refused(EnvironmentFault, "storage.in-use"):
        Store(store.root).renew(resume=True)
    assert tree(store.root) == before
