"""A world whose run is over, for all tests that only look at it."""

from __future__ import annotations

from functools import cache

from caltrain.enclave.run import State
from support.world import World


@cache
def finished_world() -> World:
    """One for the whole test session: asking it something adds to its chain and spends its (large) budgets."""
    return World(budget=100_000).run_to(State.LINKED)
