"""The operator moves the cut of a run that goes on: deeper at once, shallower with every party's word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from caltrain.errors import ConfigError, ProtocolError
from caltrain.host.kept import kept_events
from caltrain.host.store import Store
from caltrain.host_client import RunStatus
from caltrain.models.spec import Partition
from caltrain.participant.cut import agree_to_cut
from caltrain.plan import Plan
from support.company import SECONDS, Company, eventually
from support.samples import refused

pytestmark = pytest.mark.processes


def shallow(plan: Plan) -> Plan:
    """One layer in the FrontNet."""
    return msgspec.structs.replace(plan, partition=Partition(front=1, head=2))


@pytest.fixture
def company(tmp_path: Path) -> Iterator[Company]:
    """A run that trains for ever."""
    company = Company(tmp_path, epochs=10_000, change=shallow)
    try:
        company.training()
        yield company
    finally:
        company.end()


def ask(company: Company, front: int) -> RunStatus:
    with company.client() as client:
        return client.post(f"/v1/run/cut?front={front}", None, RunStatus)


def test_the_cut_moves_between_epochs_and_training_goes_on(company: Company) -> None:
    assert ask(company, 2).cut == 2
    eventually(lambda: company.status().cut is None, "the cut is made")
    assert ask(company, 1).cut == 1
    eventually(lambda: company.status().phase == "cut", "the run waits for the parties")
    assert company.status().waiting_for == ["alpha", "beta"]
    for party in company.parties:
        with company.client() as client:
            agree_to_cut(client, company.plan, party, front=1, seconds=SECONDS)
    eventually(lambda: company.status().phase == "train", "training goes on")
    epoch = company.status().epoch
    eventually(lambda: company.status().epoch > epoch + 1, "more epochs")
    assert company.status().error is None
    bodies = [event.body for event in kept_events(Store(company.store)) if event.kind == "cut"]
    assert [(body["before"], body["front"]) for body in bodies] == [(1, 2), (2, 1)]
    with refused(ConfigError, "cut.below-plan"):
        ask(company, 0)
    with company.client() as client, refused(ProtocolError, "host.not-yet"):
        client.post("/v1/parties/alpha/cut", company.parties[0].signer.sign("move-cut", {}), dict[str, object])
