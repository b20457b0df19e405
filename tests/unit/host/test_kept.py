"""What the host keeps so that a run can be taken up: found where it is whole, refused by name where it is not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.dsse import SigningKey
from caltrain.errors import CaltrainError, ConfigError, ProtocolError
from caltrain.host.kept import check_nothing_lost, check_resumable, keep_center, last_cut, newest_checkpoint
from caltrain.host.store import Store
from caltrain.plan import Plan
from caltrain.provenance.chain import Chain, EventKind
from support.disk import tree
from support.members import Member
from support.samples import refused
from support.tiny import tiny_plan

RUN = "0" * 32
BLOB = b"sealed"


@pytest.fixture
def plan() -> Plan:
    """Any plan."""
    return tiny_plan([Member("alpha")], [], head=2, dtype="u8", epochs=1, budget=1, reveal=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A folder."""
    store = Store(tmp_path)
    store.renew()
    return store


def chain(store: Store, *events: tuple[EventKind, dict[str, object]]) -> None:
    """A chain of these events in the folder."""
    writer = Chain(SigningKey(), run=RUN)
    lines = [msgspec.json.encode(writer.append(kind, body)) + b"\n" for kind, body in events]
    store.put("chain.jsonl", b"".join(lines))


def checkpoint(blob: bytes) -> tuple[EventKind, dict[str, object]]:
    """The event that makes `blob` count."""
    return "checkpoint", {"sealed": digest("checkpoint/v1", blob), "size": len(blob), "state": "ready"}


def test_the_checkpoint_that_counts_is_the_last_that_the_chain_names(store: Store, plan: Plan) -> None:
    store.put("plan.json", canonical_json(plan))
    store.put("checkpoint-0", b"older")
    store.put("checkpoint-1", BLOB + b", and what is left of a longer one")
    chain(store, checkpoint(b"older"), ("epoch", {}), checkpoint(BLOB), ("epoch", {}))
    assert newest_checkpoint(store) == "checkpoint-1"
    check_resumable(store, plan)


@pytest.mark.parametrize("kept", [None, b"half wri", b""])
def test_where_it_is_not_whole_nothing_else_counts(store: Store, kept: bytes | None) -> None:
    store.put("checkpoint-0", b"older")
    if kept is not None:
        store.put("checkpoint-1", kept)
    chain(store, checkpoint(b"older"), checkpoint(BLOB))
    with refused(ProtocolError, "resume.nothing"):
        newest_checkpoint(store)


def test_a_folder_without_a_run_is_none_to_resume(store: Store, plan: Plan) -> None:
    with refused(ProtocolError, "resume.nothing"):
        check_resumable(store, plan)
    chain(store, ("plan", {}))
    with refused(ProtocolError, "resume.nothing"):
        check_resumable(store, plan)


def test_another_plan_than_the_runs_is_refused(store: Store, plan: Plan) -> None:
    store.put("plan.json", canonical_json(plan))
    store.put("checkpoint-0", BLOB)
    chain(store, checkpoint(BLOB))
    with refused(ConfigError, "resume.plan-differs"):
        check_resumable(store, msgspec.structs.replace(plan, name="another"))


@pytest.mark.parametrize("line", [b"{}", b"garbage", b"\xff"])
def test_a_damaged_chain_is_refused_by_name(store: Store, line: bytes) -> None:
    store.put("chain.jsonl", line + b"\n")
    with refused(ProtocolError, "resume.damaged-chain"):
        newest_checkpoint(store)


@pytest.mark.parametrize(
    ("events", "lost"),
    [
        ([], False),
        ([("plan", {})], False),
        ([checkpoint(BLOB)], True),
        ([checkpoint(BLOB), ("stopped", {})], True),
        ([checkpoint(BLOB), ("release", {}), ("link", {})], False),
    ],
)
def test_an_unfinished_run_is_not_given_up_unasked(
    store: Store, events: list[tuple[EventKind, dict[str, object]]], lost: bool
) -> None:
    check_nothing_lost(store)
    chain(store, *events)
    store.append_line("chain.jsonl", b'{"half a li')
    before, caught = tree(store.root), ""
    try:
        check_nothing_lost(store)
    except CaltrainError as error:
        caught = error.code
    assert caught == ("host.unfinished-run" if lost else "")
    assert tree(store.root) == before


def test_the_last_move_of_the_cut(store: Store) -> None:
    chain(store, ("plan", {}))
    assert last_cut(store) == 0
    chain(store, ("cut", {"front": 4}), ("epoch", {}), ("cut", {"front": 3}), ("epoch", {}))
    assert last_cut(store) == 3


def test_two_states_of_the_center_are_kept(store: Store) -> None:
    for epoch in range(4):
        keep_center(store, epoch, 0, b"%d" % epoch)
    assert {name: raw for name, raw in tree(store.root).items() if name.startswith("center")} == {
        "center-at-2-0": b"2",
        "center-at-3-0": b"3",
    }
