"""That a record was left out is shown by the very list of the plan, and by nothing else."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest

from caltrain.auditor.bundle import TraceBundle, Verified, verify_bundle
from caltrain.auditor.left_out import check_left_out
from caltrain.boundary.sealed import Neighbour
from caltrain.crypto.digests import digest
from caltrain.enclave.run import State
from caltrain.errors import IntegrityError, LineageError
from support.bundles import bundle_of, traced_world
from support.repairs import FEW, entry, quarantine_of, repaired
from support.samples import refused
from support.world import World


@cache
def made() -> tuple[World, TraceBundle]:
    """A repair, and a bundle of it."""
    world = repaired().run_to(State.LINKED)
    return world, bundle_of(world)


@pytest.fixture
def verified() -> Verified:
    world, bundle = made()
    return verify_bundle(bundle, plan_digest=world.plan.digest())


def test_the_list_of_the_plan_shows_which_records_were_left_out(verified: Verified) -> None:
    world, _ = made()
    due = quarantine_of(world)
    for place in FEW:
        assert check_left_out(verified, due.encode(), commitments=[entry(world, place).commitment]) == due
    assert check_left_out(verified, due.encode(), commitments=due.commitments().values()) == due


def test_a_record_that_was_used_is_not_in_the_list(verified: Verified) -> None:
    world, _ = made()
    raw = quarantine_of(world).encode()
    used = entry(world, ("alpha", 0, 0)).commitment
    for commitment in (used, verified.trace.neighbours[0].commitment, digest("test/v1"), "nonsense"):
        with refused(LineageError, "quarantine.not-listed"):
            check_left_out(verified, raw, commitments=[entry(world, FEW[0]).commitment, commitment])


def test_another_list_shows_nothing(verified: Verified) -> None:
    world, _ = made()
    with refused(IntegrityError, "quarantine.other-list"):
        check_left_out(verified, quarantine_of(world, [*FEW, ("gamma", 0, 0)]).encode())


def test_a_run_that_is_no_repair_left_out_nothing() -> None:
    world, bundle = traced_world()
    found = verify_bundle(bundle, plan_digest=world.plan.digest())
    with refused(LineageError, "quarantine.no-repair"):
        check_left_out(found, quarantine_of(world).encode())


@pytest.mark.parametrize("what", ["record", "commitment"])
def test_a_model_that_was_linked_to_a_record_did_not_leave_it_out(what: str, verified: Verified) -> None:
    world, _ = made()
    own = entry(world, FEW[1])
    first, *rest = verified.trace.neighbours
    changes = {"record": own.record} if what == "record" else {"commitment": own.commitment}
    linked: Neighbour = msgspec.structs.replace(first, **changes)
    trace = msgspec.structs.replace(verified.trace, neighbours=(linked, *rest))
    with refused(LineageError, "quarantine.traced"):
        check_left_out(msgspec.structs.replace(verified, trace=trace), quarantine_of(world).encode())
