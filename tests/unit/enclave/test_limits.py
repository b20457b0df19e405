"""How fast a user may ask: by the enclave's clock, before anything is computed, and not refreshed by a restart."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from caltrain.boundary import messages as m
from caltrain.enclave import answer
from caltrain.enclave.run import State
from caltrain.plan import Plan
from support.world import World, pictures

INPUTS = pictures(6, seed=99)


def paced(per_hour: int) -> Any:
    def change(plan: Plan) -> Plan:
        users = tuple(msgspec.structs.replace(user, per_hour=per_hour) for user in plan.users)
        return msgspec.structs.replace(plan, users=users)

    return change


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asking:
    """A linked run whose users may ask about six inputs an hour: one in ten minutes."""

    def __init__(self, *, per_hour: int = 6, budget: int = 20, to: State = State.LINKED) -> None:
        self.clock = Clock()
        self.world = World(epochs=1, budget=budget, change=paced(per_hour))
        self.wind()
        self.world.run_to(to)

    def wind(self) -> None:
        """Give the enclave this clock."""
        self.world.run.clock = self.clock
        self.world.run.started = self.clock()

    def ask(self, count: int, *, user: str = "una") -> int:
        """Ask; what is left of the budget."""
        asked = self.world.question("predict", INPUTS[:count], user=user)
        return asked.open(self.world.done(m.Query(user, asked.envelope)).sealed[user]).budget_left

    def refused(self, count: int, *, user: str = "una", code: str = "user.too-fast") -> str:
        """Asking is refused: nothing is charged, nothing is in the chain. What to do."""
        asked = self.world.question("trace" if user == "una" else "predict", INPUTS[:count], user=user)
        return self.world.refused(m.Query(user, asked.envelope), code)["fix"]


def test_as_many_as_an_hour_has_may_come_at_once_and_then_one_after_the_other() -> None:
    asking = Asking()
    asking.ask(4)
    asking.ask(2)
    assert asking.refused(1) == "Ask again in 600 seconds."
    asking.clock.now += 599
    assert asking.refused(1) == "Ask again in 1 seconds."
    asking.clock.now += 1
    asking.ask(1)
    assert asking.refused(2) == "Ask again in 1200 seconds."
    asking.clock.now += 1200
    assert asking.ask(2) == 20 - 9


def test_waiting_longer_than_an_hour_gives_no_more_than_an_hour() -> None:
    asking = Asking()
    asking.ask(6)
    asking.clock.now += 100_000
    asking.ask(6)
    asking.refused(1)


def test_who_comes_when_they_are_told_to_is_not_sent_away_again() -> None:
    asking = Asking(per_hour=7, budget=1000)
    asking.ask(6)
    for _ in range(50):
        wait = asking.refused(6)
        asking.clock.now += int(wait.split()[3])
        asking.ask(6)


def test_more_than_an_hour_has_is_never_answered_and_says_so() -> None:
    asking = Asking(per_hour=3)
    assert asking.refused(4) == "Ask about at most 3 at a time."
    asking.ask(3)


def test_each_user_has_a_pace_of_its_own() -> None:
    asking = Asking()
    asking.ask(6)
    asking.refused(1)
    asking.ask(6, user="pat")
    asking.refused(1, user="pat")


def test_without_a_pace_the_budget_alone_counts() -> None:
    asking = Asking(per_hour=0)
    for _ in range(3):
        asking.ask(6)
    assert asking.world.run.buckets == {}


def test_the_budget_stays_the_bound_whatever_the_clock_says() -> None:
    asking = Asking(budget=8)
    asking.ask(6)
    asking.clock.now += 1e12
    asking.refused(3, code="user.budget-spent")
    asking.ask(2)
    asking.clock.now += 1e12
    asking.refused(1, code="user.budget-spent")


def test_a_clock_that_goes_back_gives_nothing_twice() -> None:
    asking = Asking()
    asking.ask(6)
    asking.clock.now += 600
    asking.ask(1)
    asking.clock.now -= 5000
    asking.refused(1)
    asking.clock.now += 5000
    asking.refused(1)
    asking.clock.now += 600
    asking.ask(1)


def test_nothing_is_computed_for_who_is_too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking()
    asking.ask(6)
    monkeypatch.setattr(answer, "_answer", lambda *_, **__: pytest.fail("it was computed"))
    asking.refused(1)
    assert asking.world.run.spent == {"una": 6}
    assert [event.body["inputs"] for event in asking.world.chain() if event.kind == "query"] == [6]


def test_a_restart_refreshes_neither_budget_nor_pace() -> None:
    asking = Asking(budget=10)
    asking.ask(6)
    world = asking.world
    world.restart()
    asking.wind()
    world.done(world.resume())
    for name in world.parties:
        done = world.done(world.rejoin(name))
    world.center_after(done)
    world.run_to(State.LINKED)
    assert world.run.spent == {"una": 6}
    assert asking.refused(1) == "Ask again in 600 seconds."
    asking.clock.now += 600
    assert asking.ask(1) == 3
    asking.ask(6, user="pat")  # who did not ask before waits for nothing


def test_the_clock_is_an_argument_of_the_enclave() -> None:
    world = World()
    assert world.run.started <= world.run.clock() <= world.run.started + 60
