"""Parties judge the cut before each epoch of a real run: what they vote is what the run does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.dsse import Envelope, envelope_from_json, open_envelope
from caltrain.errors import IntegrityError
from caltrain.exposure.figures import Estimate
from caltrain.exposure.party_report import PartyReport
from caltrain.exposure.policy import Bound, Policy
from caltrain.host.kept import kept_events
from caltrain.host.store import Store
from caltrain.models.spec import Partition
from caltrain.models.weights import decode_state, model_digest
from caltrain.participant.assess import Records, Voted, assess
from caltrain.participant.identity import Identity
from caltrain.plan import ExposureSpec, Plan
from caltrain.provenance.statements import ExposureVote
from support.company import LABELS, SECONDS, Company, eventually
from support.recovery import DEEP
from support.samples import refused
from support.world import pictures

pytestmark = pytest.mark.processes
FIGURE = Estimate(0.1, 0.0, 0.2, 8)


def judged(plan: Plan) -> Plan:
    """A policy that only attacks can check, over a model with several cuts."""
    policy = Policy(bounds=(Bound(measure="ssim", at_most=0.3),))
    return msgspec.structs.replace(
        plan, model=DEEP, partition=Partition(front=2, head=2), exposure=ExposureSpec(policy=policy, sample=8)
    )


class Judge:
    """Stands for the attacks: wants the cuts that it is given, in turn, and keeps what it was shown."""

    def __init__(self, *wanted: int) -> None:
        self.wanted, self.shown = list(wanted), list[tuple[str, tuple[int, ...], Records]]()

    def __call__(
        self, plan: Plan, spec: ExposureSpec, weights: bytes, cuts: tuple[int, ...], records: Records
    ) -> PartyReport:
        model = model_digest(plan.model, decode_state(weights, step="test"))
        self.shown.append((model, cuts, records))
        return PartyReport(
            model=model,
            budget="quick",
            adversary_records=8,
            figures={cut: {"whitebox.ssim": FIGURE} for cut in cuts},
            misses={},
            front=self.wanted[len(self.shown) - 1],
        )


@contextmanager
def judging(folder: Path) -> Iterator[Company]:
    """A run that asks its parties before each epoch."""
    company = Company(folder, epochs=3, change=judged)
    try:
        company.join()
        yield company
    finally:
        company.end()


@pytest.fixture
def company(tmp_path: Path) -> Iterator[Company]:
    with judging(tmp_path) as company:
        yield company


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    """One that still waits for its first votes, until the last test."""
    with judging(tmp_path_factory.mktemp("unjudged")) as company:
        yield company


def votes(company: Company, party: Identity, judge: Judge) -> list[Voted]:
    """What the party votes until training is over; to be run in a thread."""
    given: list[Voted] = []
    with company.client() as client:
        while (voted := assess(client, company.plan, party, judge=judge, seconds=SECONDS)) is not None:
            given.append(voted)
    return given


def test_the_deepest_vote_is_the_cut_and_the_run_ends_well(company: Company) -> None:
    judges = [Judge(2, 2, 4), Judge(2, 3, 3)]
    given: dict[str, list[Voted]] = {}

    def vote(party: Identity, judge: Judge) -> None:
        given[party.name] = votes(company, party, judge)

    threads = [threading.Thread(target=vote, args=pair) for pair in zip(company.parties, judges, strict=True)]
    for thread in threads:
        thread.start()
    company.joined()
    assert not company.errors, company.errors
    for thread in threads:
        thread.join(timeout=SECONDS)
    events = kept_events(Store(company.store))
    cuts = [(e.body["epoch"], e.body["front"]) for e in events if e.kind == "cut"]
    assert cuts == [(1, 3), (2, 4)]
    assert [e.body["front"] for e in events if e.kind == "vote" and e.body["party"] == "beta"] == [2, 3, 3]
    assert [cuts for _, cuts, _ in judges[0].shown] == [(2, 3, 4, 5), (2, 3, 4, 5), (3, 4, 5)]
    elements, labels = judges[1].shown[0][2]
    order = sorted(range(16), key=lambda row: elements[row].tobytes())
    own = pictures(16, seed=1)
    assert [elements[row].tobytes() for row in order] == sorted(picture.tobytes() for picture in own)
    assert sorted(labels) == sorted(LABELS)
    for party in company.parties:
        check_kept(company, party, given[party.name])


def check_kept(company: Company, party: Identity, given: list[Voted]) -> None:
    """The signed reports lie in the party's folder, and are those that the chain names."""
    named = [
        event.body["report"]
        for event in kept_events(Store(company.store))
        if event.kind == "vote" and event.body["party"] == party.name
    ]
    for voted, name in zip(given, named, strict=True):
        raw = (party.folder / "runs" / voted.run / f"exposure-{voted.epoch}.json").read_bytes()
        envelope: Envelope = envelope_from_json(raw, step="test")
        report = open_envelope(envelope, "party-report", party.signer.public, PartyReport, step="test")
        assert report == voted.report
        assert name == digest("party-report/v1", canonical_json(report))


def test_a_bad_vote_is_refused_and_changes_nothing(unjudged: Company) -> None:
    eventually(lambda: unjudged.status().phase == "assess", "votes are due")
    vote = ExposureVote(
        run="0" * 32,
        epoch=0,
        model=digest("test/v1"),
        party="alpha",
        front=2,
        report=digest("test/v1"),
    )
    alpha = unjudged.parties[0]
    with unjudged.client() as client, refused(IntegrityError, "vote.not-this"):
        client.post("/v1/parties/alpha/vote", alpha.signer.sign("exposure-vote", vote), dict[str, object])
    assert unjudged.status().waiting_for == ["alpha", "beta"]
    assert unjudged.status().error is None


def test_last_a_party_that_accepts_no_cut_ends_the_run(unjudged: Company) -> None:
    for party, wanted in zip(unjudged.parties, (2, 0), strict=True):
        with unjudged.client() as client:
            voted = assess(client, unjudged.plan, party, judge=Judge(wanted), seconds=SECONDS)
            assert voted is not None
    eventually(lambda: unjudged.status().error is not None, "the run has ended")
    error = unjudged.status().error
    assert error is not None
    assert error["code"] == "exposure.no-cut"
    kinds = [event.kind for event in kept_events(Store(unjudged.store))]
    assert kinds[-1] == "stopped"
    assert "epoch" not in kinds
