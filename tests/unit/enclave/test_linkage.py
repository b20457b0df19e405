"""The linkage store: what was acknowledged is found, exactly; what the host changed, lost or turned back is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from caltrain.accountability import segments
from caltrain.boundary.messages import Answer, Call, CallFailed, Data, Read, Write
from caltrain.enclave import shelves
from caltrain.enclave.door import Door
from caltrain.enclave.linkage import Hit, LinkageStore, Where
from caltrain.enclave.segments import Place
from caltrain.errors import CaltrainError, DataError, EnvironmentFault
from caltrain.host.launcher import serve_storage
from caltrain.host.store import Store
from caltrain.records.commitment import RecordRef
from support.links import MODEL, OTHER_MODEL, Known, drawn, nearest_of, queries
from support.memory_host import MemoryHost

RUN = "ab" * 16
ASKED = queries(4)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_BLOCK_BYTES", 1000)  # 13 rows
    monkeypatch.setattr(shelves, "_SMALL", 30)


def made(*sizes: int) -> tuple[MemoryHost, LinkageStore, Known]:
    """A store with a segment of each of these sizes, at times 0, 10, 20 and so on."""
    host, known = MemoryHost(), Known()
    store = LinkageStore.create(Door(host.enclave_channel), Place.fresh(RUN))
    for seed, size in enumerate(sizes):
        batch, more = drawn(size, seed=seed)
        store.append(batch, model=MODEL, time=10 * seed)
        known |= more
    return host, store, known


def told(hits: list[Hit]) -> list[tuple[RecordRef, float]]:
    return [(hit.record, round(hit.distance, 12)) for hit in hits]


def again(host: MemoryHost, store: LinkageStore, *, head: str | None = None) -> LinkageStore:
    return LinkageStore.open(Door(host.enclave_channel), store.place, head=head or store.head)


def answers_truly(store: LinkageStore, known: Known, *, k: int = 5) -> None:
    for labels in (None, {1}, {0, 2}):
        found = store.nearest(ASKED, model=MODEL, labels=sorted(labels) if labels else None, k=k)
        for query, hits in zip(ASKED, found, strict=True):
            assert told(hits) == nearest_of(known, query, k, labels)
            assert all((hit.label, hit.commitment) == known[hit.record][:2] for hit in hits)


def refused(code: str, act: Callable[[], object]) -> CaltrainError:
    with pytest.raises(CaltrainError) as raised:
        act()
    assert raised.value.code == code
    return raised.value


# --- what is in it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,), (40, 3, 100), (2,) * 20], ids=str)
def test_what_was_added_is_found_warm_and_after_a_restart(sizes: tuple[int, ...]) -> None:
    host, store, known = made(*sizes)
    k = min(5, *(sum(entry[0] == label for entry in known.values()) for label in {e[0] for e in known.values()}))
    if len(sizes) > 1:
        answers_truly(store, known, k=k)
        answers_truly(again(host, store), known, k=k)
    fresh = again(host, store)
    entries = {r: (y, h, f) for y in fresh.labels(MODEL) for r, h, f in fresh.entries(MODEL, y)}
    assert entries.keys() == known.keys()
    for reference, (label, commitment, fingerprint) in known.items():
        assert entries[reference][:2] == (label, commitment)
        assert torch.equal(entries[reference][2], fingerprint)
        assert fresh.find(MODEL, commitment) == reference
    assert fresh.find(MODEL, bytes(32)) is None


def test_models_stand_side_by_side() -> None:
    host, store, known = made(50)
    batch, others = drawn(60, seed=7, dims=9)
    store.append(batch, model=OTHER_MODEL, time=5)
    for now in (store, again(host, store)):
        answers_truly(now, known)
        assert sum(now.count(OTHER_MODEL, label) for label in now.labels(OTHER_MODEL)) == len(others)
    refused("linkage.other-size", lambda: store.append(batch, model=MODEL, time=6))


def test_a_class_is_read_when_it_is_asked_for_and_no_other() -> None:
    host, store, _ = made(300)
    cold = again(host, store)
    reads: list[Read] = []

    def read(call: Read) -> Answer:
        reads.append(call)
        return host.read(call)

    host.on_read = read
    cold.count(MODEL, 1)
    blocks = -(-300 // 13)
    assert 0 < len(reads) < blocks / 2
    before = len(reads)
    cold.nearest(ASKED, model=MODEL, labels=[1], k=3)
    assert len(reads) == before
    cold.load(MODEL)
    assert len(reads) >= blocks
    cold.unload(MODEL)
    assert cold.nbytes(MODEL) == 0


def test_memory_is_two_bytes_a_dimension_and_at_most_64_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "_SMALL", 1 << 16)
    store = LinkageStore.create(Door(MemoryHost().enclave_channel), Place.fresh(RUN))
    store.append(drawn(4000, seed=1, dims=256)[0], model=MODEL, time=0)
    store.load(MODEL)
    assert store.nbytes(MODEL) / 4000 <= 2 * 256 + 64


def test_what_is_added_to_a_class_in_memory_is_not_read_back() -> None:
    host, store, known = made(60)
    store.load(MODEL)
    host.on_read = lambda _call: Data()
    batch, more = drawn(50, seed=5)
    store.append(batch, model=MODEL, time=1)
    answers_truly(store, known | more)


def test_one_adds_while_others_search() -> None:
    _, store, known = made(200)
    store.load(MODEL)
    failed: list[BaseException] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                found = store.nearest(ASKED[:1], model=MODEL, labels=None, k=5)[0]
                assert len({hit.record for hit in found}) == 5
        except BaseException as error:  # noqa: BLE001  # shown below
            failed.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    for seed in range(10, 30):
        batch, more = drawn(20, seed=seed)
        store.append(batch, model=MODEL, time=seed)
        known |= more
    done.set()
    thread.join()
    assert not failed
    answers_truly(store, known)


# --- filters --------------------------------------------------------------------------------------------------------


def test_only_records_of_the_contributors_asked_for_count() -> None:
    _, store, known = made(100, 50)
    mine = {reference: entry for reference, entry in known.items() if reference.party == "beta"}
    found = store.nearest(ASKED, model=MODEL, labels=None, k=7, where=Where(frozenset({"beta"})))
    for query, hits in zip(ASKED, found, strict=True):
        assert told(hits) == nearest_of(mine, query, 7)


@pytest.mark.parametrize(("since", "until", "seeds"), [(0, 9, {0}), (10, 10, {1}), (5, 20, {1, 2}), (20, 99, {2})])
def test_only_records_of_the_time_asked_for_count(since: int, until: int, seeds: set[int]) -> None:
    _, store, known = made(50, 50, 50)
    mine = {reference: entry for reference, entry in known.items() if reference.leaf // 10_000 in seeds}
    found = store.nearest(ASKED, model=MODEL, labels=None, k=7, where=Where(since=since, until=until))
    for query, hits in zip(ASKED, found, strict=True):
        assert told(hits) == nearest_of(mine, query, 7)
        assert {hit.time for hit in hits} <= {10 * seed for seed in seeds}


BAD: dict[str, tuple[Callable[[LinkageStore], object], str]] = {
    "a model that was never linked": (
        lambda s: s.nearest(ASKED, model=OTHER_MODEL, labels=None, k=1),
        "linkage.unknown-model",
    ),
    "an unknown contributor": (
        lambda s: s.nearest(ASKED, model=MODEL, labels=None, k=1, where=Where(frozenset({"eve"}))),
        "linkage.unknown-contributor",
    ),
    "a class without records": (lambda s: s.nearest(ASKED, model=MODEL, labels=[9], k=1), "linkage.empty-class"),
    "a time without records": (
        lambda s: s.nearest(ASKED, model=MODEL, labels=None, k=1, where=Where(since=99)),
        "linkage.empty-class",
    ),
    "more neighbours than the class has": (
        lambda s: s.nearest(ASKED, model=MODEL, labels=[0], k=s.count(MODEL, 0) + 1),
        "linkage.too-few",
    ),
    "a query of another model": (
        lambda s: s.nearest(queries(1, dims=5), model=MODEL, labels=None, k=1),
        "search.query",
    ),
    "a record that does not exist": (
        lambda s: s.remove([RecordRef("alpha", "0" * 32, 4_000_000)], model=MODEL, time=1),
        "linkage.unknown-record",
    ),
    "a record of a shard that does not exist": (
        lambda s: s.remove([RecordRef("eve", "9" * 32, 1)], model=MODEL, time=1),
        "linkage.unknown-record",
    ),
    "a removal of nothing": (lambda s: s.remove([], model=MODEL, time=1), "linkage.unknown-record"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_refused_and_nothing_is_lost(name: str) -> None:
    host, store, known = made(60)
    act, code = BAD[name]
    head = store.head
    assert isinstance(refused(code, lambda: act(store)), DataError)
    assert store.head == head
    answers_truly(store, known)
    answers_truly(again(host, store), known)


# --- removal and rebuild ----------------------------------------------------------------------------------------------


def test_a_removed_record_is_found_no_more_and_can_be_linked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caltrain.enclave.linkage.MAX_REMOVED", 4)
    host, store, known = made(80, 40)
    gone = sorted(known)[::3]
    before = store.head
    assert store.remove(gone, model=MODEL, time=30) == store.head != before
    left = {reference: entry for reference, entry in known.items() if reference not in gone}
    for now in (store, again(host, store)):
        answers_truly(now, left)
        assert now.find(MODEL, known[gone[0]][1]) is None
    refused("linkage.unknown-record", lambda: store.remove(gone[:1], model=MODEL, time=31))
    batch, same = drawn(80, seed=0)
    store.append(batch, model=MODEL, time=40)
    for now in (store, again(host, store)):
        assert now.find(MODEL, same[gone[0]][1]) == gone[0]


def test_a_rebuilt_store_holds_what_counts_under_another_key() -> None:
    host, store, known = made(80, 1, 40)
    alone = next(reference for reference in known if reference.leaf // 10_000 == 1)
    gone = [alone, *sorted(known)[::4]]
    store.remove(gone, model=MODEL, time=30)
    batch, _ = drawn(10, seed=8, dims=5)
    store.append(batch, model=OTHER_MODEL, time=31)
    fresh = store.rebuild()
    left = {reference: entry for reference, entry in known.items() if reference not in gone}
    for now in (store, fresh, again(host, fresh), again(host, store)):
        answers_truly(now, left)
        assert sum(now.count(OTHER_MODEL, label) for label in now.labels(OTHER_MODEL)) == 10
    old = Place(RUN, store.place.key, fresh.place.generation)
    refused("segment.damaged", lambda: LinkageStore.open(Door(host.enclave_channel), old, head=fresh.head))


# --- a host that loses, changes or turns back -----------------------------------------------------------------------


def of_another_run(host: MemoryHost) -> None:
    stranger = MemoryHost()
    other = LinkageStore.create(Door(stranger.enclave_channel), Place.fresh("cd" * 16))
    other.append(drawn(40, seed=0)[0], model=MODEL, time=0)
    host.storage["linkage-0-0"] = stranger.storage["linkage-0-0"]


def flipped(name: str, at: int) -> Callable[[MemoryHost], None]:
    def attack(host: MemoryHost) -> None:
        host.storage[name][at] ^= 1

    return attack


def cut(name: str, length: int) -> Callable[[MemoryHost], None]:
    def attack(host: MemoryHost) -> None:
        del host.storage[name][length:]

    return attack


def moved(host: MemoryHost) -> None:
    host.storage["linkage-0-1"] = host.storage["linkage-0-2"]


def endless(host: MemoryHost) -> None:
    host.storage["linkage-0-1"][32:36] = b"\xff\xff\xff\x7f"


ATTACKS: dict[str, tuple[Callable[[MemoryHost], object], str]] = {
    "older": (lambda host: host.storage.pop("linkage-0-2"), "linkage.older"),
    "with a hole": (lambda host: host.storage.pop("linkage-0-1"), "linkage.older"),
    "empty": (lambda host: host.storage.clear(), "linkage.older"),
    "cut short": (cut("linkage-0-2", 60), "linkage.older"),
    "of another run": (of_another_run, "linkage.foreign"),
    "in another place": (moved, "linkage.foreign"),
    "damaged in front": (flipped("linkage-0-1", 0), "linkage.foreign"),
    "damaged": (flipped("linkage-0-1", 80), "segment.damaged"),
    "with a header without end": (endless, "segment.damaged"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_store_that_is_not_what_it_was_is_refused_by_name(name: str) -> None:
    host, store, known = made(40, 40, 40)
    kept = {name: bytearray(raw) for name, raw in host.storage.items()}
    attack, code = ATTACKS[name]
    attack(host)
    refused(code, lambda: again(host, store))
    host.storage = kept
    answers_truly(again(host, store), known)


def test_a_store_that_was_turned_back_and_went_on_is_refused() -> None:
    host, store, _ = made(40)
    kept = {name: bytearray(raw) for name, raw in host.storage.items()}
    back = again(host, store)
    store_ahead = again(host, store)
    store_ahead.append(drawn(10, seed=5)[0], model=MODEL, time=1)
    first = host.storage["linkage-0-1"]
    host.storage = kept
    back.append(drawn(10, seed=6)[0], model=MODEL, time=1)
    back.append(drawn(10, seed=7)[0], model=MODEL, time=1)
    refused("linkage.older", lambda: again(host, store_ahead))
    host.storage["linkage-0-1"] = first
    refused("linkage.forked", lambda: again(host, back))


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (flipped("linkage-0-1-rows", 5), "segment.damaged"),
        (cut("linkage-0-1-rows", 5), "linkage.missing"),
        (lambda host: host.storage.pop("linkage-0-1-rows"), "linkage.missing"),
        (lambda host: host.storage.update({"linkage-0-1-rows": host.storage["linkage-0-0-rows"]}), "segment.damaged"),
    ],
    ids=["changed", "cut short", "gone", "of another segment"],
)
def test_rows_that_are_not_what_they_were_are_refused_when_they_are_read(
    attack: Callable[[MemoryHost], object], code: str
) -> None:
    host, store, known = made(40, 40)
    warm = again(host, store)
    warm.load(MODEL)
    kept = {name: bytearray(raw) for name, raw in host.storage.items()}
    attack(host)
    answers_truly(warm, known)
    cold = LinkageStore.open(Door(host.enclave_channel), store.place, head=store.head)
    error = refused(code, lambda: cold.load(MODEL))
    assert "segment 1" in str(error)
    host.storage = kept
    answers_truly(cold, known)


def test_another_failure_of_the_host_is_its_own_error() -> None:
    host, store, _ = made(40)
    error = EnvironmentFault("storage.failed", "broken", step="read", fix="Look.")
    cold = again(host, store)
    host.on_read = lambda _call: CallFailed(error.diagnostics())
    refused("storage.failed", lambda: cold.load(MODEL))


@pytest.mark.parametrize("object_", ["linkage-0-1-rows", "linkage-0-1"])
def test_an_append_that_the_host_did_not_take_adds_nothing(object_: str) -> None:
    host, store, known = made(40)
    full = EnvironmentFault("storage.full", "full", step="write", fix="Free space.")

    def write(call: Write) -> Answer:
        return CallFailed(full.diagnostics()) if call.name == object_ else host.write(call)

    head, host.on_write = store.head, write
    batch, more = drawn(20, seed=5)
    refused("storage.full", lambda: store.append(batch, model=MODEL, time=1))
    assert store.head == head
    host.be_honest()
    answers_truly(store, known)
    answers_truly(again(host, store), known)
    store.append(batch, model=MODEL, time=1)
    answers_truly(again(host, store), known | more)


def test_rows_are_durable_before_the_header_that_makes_them_count() -> None:
    host, store, _ = made()
    written: list[tuple[str, bool]] = []

    def write(call: Write) -> Answer:
        written.append((call.name, call.durable))
        return host.write(call)

    host.on_write = write
    store.append(drawn(20, seed=5)[0], model=MODEL, time=1)
    assert written == [("linkage-0-0-rows", False), ("linkage-0-0-rows", True), ("linkage-0-0", True)]


def test_what_is_torn_after_the_head_is_dropped_and_what_is_whole_counts() -> None:
    host, store, known = made(40)
    early = store.head
    batch, more = drawn(20, seed=5)
    store.append(batch, model=MODEL, time=1)
    answers_truly(again(host, store, head=early), known | more)
    whole = bytes(host.storage["linkage-0-1"])
    for length in range(len(whole)):
        host.storage["linkage-0-1"] = bytearray(whole[:length])
        assert again(host, store, head=early).head == early
    host.storage["linkage-0-1"] = bytearray(len(whole))
    torn = again(host, store, head=early)
    batch, other = drawn(30, seed=6)
    torn.append(batch, model=MODEL, time=2)
    answers_truly(again(host, torn), known | other)


def test_the_host_sees_no_fingerprint_and_no_commitment() -> None:
    host, _, known = made(40)
    raw = b"".join(bytes(stored) for stored in host.storage.values())
    for _, commitment, fingerprint in known.values():
        assert commitment not in raw
        assert fingerprint.numpy().tobytes() not in raw
    assert b"alpha" not in raw


# --- kill -9 --------------------------------------------------------------------------------------------------------

ADDING = """
import sys
sys.path[:0] = {paths!r}
from unit_linkage_disk import folder_store
from support.links import MODEL, drawn
store = folder_store({folder!r}, bytes.fromhex({key!r}))
for seed in range(10_000):
    store.append(drawn(50, seed=seed)[0], model=MODEL, time=seed)
    print(seed, store.head, flush=True)
"""


class FolderDoor(Door):
    """The host's real storage, without a stream in between."""

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder)

    def _call(self, call: Call) -> bytes:
        assert isinstance(call, Read | Write)
        answer = serve_storage(self._store, call)
        if isinstance(answer, Data):
            return answer.data
        raise EnvironmentFault(answer.error["code"], "the host", step="test", fix="none")


def test_killed_while_adding_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    module = tmp_path / "unit_linkage_disk.py"
    module.write_text(
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\nfrom test_linkage import RUN, FolderDoor\n"
        "from caltrain.enclave.linkage import LinkageStore\nfrom caltrain.enclave.segments import Place\n"
        "def folder_store(folder, key):\n"
        "    return LinkageStore.create(FolderDoor(Path(folder)), Place(RUN, key))\n"
    )
    paths = [str(tmp_path), str(Path(__file__).parents[2])]
    for attempt, acknowledged in enumerate((1, 4, 9)):
        folder, key = tmp_path / f"host-{attempt}", os.urandom(32)
        program = ADDING.format(paths=paths, folder=str(folder), key=key.hex())
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as adding:
            assert adding.stdout is not None
            lines = [adding.stdout.readline() for _ in range(acknowledged)]
            adding.send_signal(signal.SIGKILL)
            lines += adding.stdout.readlines()
        seed, head = next(line for line in reversed(lines) if line.endswith("\n")).split()
        store = LinkageStore.open(FolderDoor(folder), Place(RUN, key), head=head)
        known: Known = {}
        for each in range(int(seed) + 1):
            known |= drawn(50, seed=each)[1]
        found = {r for label in store.labels(MODEL) for r, _, _ in store.entries(MODEL, label)}
        assert found >= known.keys()
        assert len(found) - len(known) in {0, 50}  # one more may have been whole
        batch, _ = drawn(50, seed=20_000)
        store.append(batch, model=MODEL, time=1)
        answers = LinkageStore.open(FolderDoor(folder), Place(RUN, key), head=store.head)
        assert (
            len({r for label in answers.labels(MODEL) for r, _, _ in answers.entries(MODEL, label)}) == len(found) + 50
        )
