"""Which checkpoint counts: the one that the chain names last, if it lies there whole; and the CenterNets beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from caltrain.crypto.digests import canonical_json, digest
from caltrain.errors import ConfigError, ProtocolError
from caltrain.host.kept import center_object, check_resumable, keep_center, newest_checkpoint
from caltrain.host.store import Store
from caltrain.provenance.chain import Chain, EventKind
from support.disk import tree
from support.samples import plan, refused, signer

RUN = "ab" * 16


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "host")


def tell(store: Store, *events: tuple[EventKind, dict[str, Any]]) -> None:
    """A chain of these events."""
    chain = Chain(signer("enclave"), run=RUN)
    for kind, body in events:
        store.append_line("chain.jsonl", msgspec.json.encode(chain.append(kind, body)))


def checkpoint(blob: bytes) -> tuple[EventKind, dict[str, Any]]:
    """What the chain says of a checkpoint."""
    return "checkpoint", {"state": "ready", "sealed": digest("checkpoint/v1", blob), "size": len(blob)}


OLD, NEW = b"an older checkpoint, and longer", b"a newer checkpoint"


@pytest.mark.parametrize("newest", ["checkpoint-0", "checkpoint-1"])
def test_the_checkpoint_that_the_chain_names_last_is_taken(store: Store, newest: str) -> None:
    other = "checkpoint-1" if newest == "checkpoint-0" else "checkpoint-0"
    store.put(newest, NEW)
    store.put(other, OLD)
    os.utime(store.path(newest), (1, 1))  # its age on the disk says nothing
    tell(store, ("plan", {}), checkpoint(OLD), ("epoch", {"epoch": 0}), checkpoint(NEW), ("epoch", {"epoch": 1}))
    assert newest_checkpoint(store) == newest


def test_what_a_longer_checkpoint_left_behind_does_not_count(store: Store) -> None:
    store.write("checkpoint-0", OLD, offset=0)
    store.write("checkpoint-0", NEW, offset=0)
    assert store.read_whole("checkpoint-0").startswith(NEW)
    assert len(store.read_whole("checkpoint-0")) == len(OLD)
    tell(store, checkpoint(NEW))
    assert newest_checkpoint(store) == "checkpoint-0"


@pytest.mark.parametrize("kept", [{}, {"checkpoint-0": OLD}, {"checkpoint-0": OLD, "checkpoint-1": NEW[:-1]}])
def test_without_the_checkpoint_that_the_chain_names_last_there_is_nothing(
    store: Store, kept: dict[str, bytes]
) -> None:
    for name, blob in kept.items():
        store.put(name, blob)
    tell(store, checkpoint(OLD), checkpoint(NEW))
    with refused(ProtocolError, "resume.nothing"):
        newest_checkpoint(store)


def test_a_checkpoint_that_no_event_names_is_nothing(store: Store) -> None:
    store.put("checkpoint-0", NEW)
    with refused(ProtocolError, "resume.nothing"):
        newest_checkpoint(store)
    tell(store, ("plan", {}), ("manifest", {}))
    with refused(ProtocolError, "resume.nothing"):
        newest_checkpoint(store)


def test_a_run_is_taken_up_with_its_own_plan_only(store: Store) -> None:
    store.put("checkpoint-0", NEW)
    store.put("plan.json", canonical_json(plan()))
    with refused(ProtocolError, "resume.nothing"):
        check_resumable(store, plan())
    tell(store, checkpoint(NEW))
    check_resumable(store, plan())
    with refused(ConfigError, "resume.plan-differs"):
        check_resumable(store, plan(name="another"))


def test_the_centers_of_two_checkpoints_are_kept(store: Store) -> None:
    for number in range(4):
        keep_center(store, 1, number, b"state %d" % number)
        os.utime(store.path(center_object(1, number)), ns=(number, number))
    assert tree(store.root) == {"center-at-1-2": b"state 2", "center-at-1-3": b"state 3"}
    keep_center(store, 1, 3, b"again")
    assert tree(store.root) == {"center-at-1-2": b"state 2", "center-at-1-3": b"again"}
