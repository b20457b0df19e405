"""A party's vote on the cut: what it checks first, and that a refusal sends and keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.boundary import messages as m
from caltrain.boundary.sealed import ReleasedPart, seal_for
from caltrain.crypto.digests import canonical_json, digest
from caltrain.crypto.dsse import Envelope, open_envelope
from caltrain.enclave.run import State, present
from caltrain.errors import (
    CaltrainError,
    ConfigError,
    EnvironmentFault,
    IntegrityError,
    LineageError,
    ProtocolError,
)
from caltrain.exposure.party_report import PartyReport
from caltrain.exposure.policy import Bound, Policy
from caltrain.host_client import HostClient, RunStatus
from caltrain.models.weights import decode_state, encode_state, model_digest
from caltrain.participant.assess import Records, Voted, assess
from caltrain.participant.journal import KeptRun, keep_run
from caltrain.plan import ExposureSpec, Plan
from caltrain.provenance.chain import empty_head
from caltrain.provenance.statements import AssessedModel, ExposureVote
from support.disk import tree
from support.folders import identity_of, signed_manifest
from support.recovery import DEEP, planned
from support.samples import refused
from support.world import World

Change = Callable[[Any], Any]


def judged(plan: Plan) -> Plan:
    """A policy that parties check, over a model with several cuts."""
    spec = ExposureSpec(policy=Policy(bounds=(Bound(measure="ssim", at_most=0.3),)), sample=8)
    return msgspec.structs.replace(planned(model=DEEP)(plan), exposure=spec)


class Waiting:
    """Alpha, whose vote a run waits for after its first epoch. `edit` changes the host's answers by path."""

    def __init__(self, folder: Path) -> None:
        self.world = World(change=judged).run_to(State.READY)
        self.world.train()
        self.alpha = identity_of(self.world.parties["alpha"], folder)
        self.run, self.manifest = self.world.manifest.run, signed_manifest(self.world)
        kept = KeptRun(
            plan=self.world.plan.digest(),
            manifest=self.world.manifest.digest(),
            signing_key=self.world.run.vault.signing.public,
            head=empty_head(self.run),
        )
        keep_run(folder, self.run, kept)
        done = self.world.done(m.Assess())
        self.signed, self.sealed = present(done.signed), done.sealed
        self.world.statements["assessed-model"] = self.signed
        self.status = RunStatus(phase="assess", waiting_for=["alpha", "beta"])
        self.edit: dict[str, Change] = {}
        self.posted: list[Envelope] = []
        self.wanted, self.shown = 3, list[tuple[str, tuple[int, ...], Records]]()

    def judge(
        self, plan: Plan, _spec: ExposureSpec, weights: bytes, cuts: tuple[int, ...], records: Records
    ) -> PartyReport:
        """Stands for the attacks."""
        model = model_digest(plan.model, decode_state(weights, step="test"))
        self.shown.append((model, cuts, records))
        return PartyReport(model=model, budget="quick", adversary_records=4, figures={}, misses={}, front=self.wanted)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/v1/")
        try:
            body = self.edit.get(path, lambda same: same)(self._body(path, request))
        except CaltrainError as error:
            return httpx.Response(409, content=msgspec.json.encode({"error": error.diagnostics()}))
        return httpx.Response(200, content=body if isinstance(body, bytes) else msgspec.json.encode(body))

    def _body(self, path: str, request: httpx.Request) -> Any:  # noqa: PLR0911  # one case a path
        match path.split("/"):
            case ["run"]:
                return self.status
            case ["manifest"]:
                return self.manifest
            case ["artifacts", "chain.jsonl"]:
                return b"".join(msgspec.json.encode(event) + b"\n" for event in self.world.events)
            case ["artifacts", "semi-trained.json"]:
                return msgspec.json.encode(self.signed)
            case ["artifacts", "semi-trained", name]:
                return self.sealed[name]
            case ["artifacts", "center"]:
                return self.world.host.the_center.weights()
            case ["parties", name, "vote"]:
                self.posted.append(msgspec.json.decode(request.read(), type=Envelope))
                self.world.done(m.Vote(name, self.posted[-1]))
                return {}
        raise AssertionError(path)

    def assess(self, *, least: int = 0, seconds: float = 0) -> Voted | None:
        """Alpha votes."""
        with HostClient("http://host", transport=httpx.MockTransport(self._answer)) as client:
            return assess(client, self.world.plan, self.alpha, judge=self.judge, least=least, seconds=seconds)


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    return Waiting(tmp_path)


def test_the_vote_is_for_what_was_found_and_its_report_is_kept(waiting: Waiting) -> None:
    voted = waiting.assess()
    assert voted is not None
    ((model, cuts, (elements, labels)),) = waiting.shown
    statement = waiting.world.statement("assessed-model", AssessedModel)
    assert (model, cuts) == (statement.model, (2, 3, 4, 5))
    assert (elements.shape, labels.shape) == ((9, 1, 4, 4), (9,))
    key = waiting.alpha.signer.public
    vote = open_envelope(waiting.posted[0], "exposure-vote", key, ExposureVote, step="test")
    assert (vote.front, vote.epoch, vote.model, vote.party) == (3, 1, model, "alpha")
    raw = (waiting.alpha.folder / "runs" / waiting.run / "exposure-1.json").read_bytes()
    kept = open_envelope(msgspec.json.decode(raw, type=Envelope), "party-report", key, PartyReport, step="test")
    assert kept == voted.report
    assert present(waiting.world.run.assessment).votes == {"alpha": 3}


def test_a_host_that_asks_again_gets_the_same_word(waiting: Waiting) -> None:
    first = waiting.assess()
    waiting.wanted = 2  # what other draws might have come to
    present(waiting.world.run.assessment).votes.clear()
    assert waiting.assess() == first
    assert len(waiting.shown) == 1
    assert waiting.posted[0] == waiting.posted[1]


@pytest.mark.parametrize("changes", [{"model": digest("test/v1")}, {"front": 1}], ids=["model", "cut"])
def test_what_was_found_of_another_model_or_from_a_shallower_cut_on_does_not_count(
    waiting: Waiting, changes: dict[str, Any]
) -> None:
    first = present(waiting.assess())
    kept = msgspec.structs.replace(first.report, **changes)
    path = waiting.alpha.folder / "runs" / waiting.run / "exposure-1.json"
    path.write_bytes(msgspec.json.encode(waiting.alpha.signer.sign("party-report", kept)))
    present(waiting.world.run.assessment).votes.clear()
    assert waiting.assess() == first
    assert len(waiting.shown) == 2


def test_a_kept_report_that_is_not_our_own_is_not_voted_by(waiting: Waiting) -> None:
    first = present(waiting.assess())
    path = waiting.alpha.folder / "runs" / waiting.run / "exposure-1.json"
    path.write_bytes(msgspec.json.encode(waiting.world.parties["beta"].signer.sign("party-report", first.report)))
    with refused(IntegrityError, "signature.invalid"):
        waiting.assess()
    assert len(waiting.posted) == 1


@pytest.mark.parametrize(("wanted", "least", "front"), [(2, 4, 4), (5, 4, 5), (0, 4, 0), (3, 1, 3), (2, 6, 0)])
def test_a_party_may_ask_for_more_than_it_found(waiting: Waiting, wanted: int, least: int, front: int) -> None:
    waiting.wanted = wanted
    voted = waiting.assess(least=least)
    assert voted is not None
    assert voted.front == front
    assert present(waiting.world.run.assessment).votes == {"alpha": front}


def test_once_training_is_over_there_is_nothing_to_vote_on(waiting: Waiting) -> None:
    waiting.status = RunStatus(phase="linked")
    assert waiting.assess() is None
    assert waiting.posted == []


def other_statement(waiting: Waiting) -> Change:
    statement = waiting.world.statement("assessed-model", AssessedModel)
    forged = msgspec.structs.replace(statement, epoch=2)
    return lambda _: msgspec.json.encode(waiting.world.run.vault.signing.sign("assessed-model", forged))


def other_center(waiting: Waiting) -> Change:
    state = decode_state(waiting.world.host.the_center.weights(), step="test")
    name = next(iter(state))
    return lambda _: encode_state(state | {name: state[name] + 1})


def not_the_enclaves(waiting: Waiting) -> Change:
    statement = waiting.world.statement("assessed-model", AssessedModel)
    return lambda _: msgspec.json.encode(waiting.alpha.signer.sign("assessed-model", statement))


def other_part(waiting: Waiting) -> Change:
    part = ReleasedPart(model=digest("test/v1"), weights=b"")
    sealed = seal_for(waiting.alpha.data_key, "semi-trained/v1", part, context=waiting.run)
    return lambda _: sealed


REFUSED: dict[str, tuple[str, Callable[[Waiting], Change], type[CaltrainError], str]] = {
    "figures of another epoch": ("artifacts/semi-trained.json", other_statement, IntegrityError, "assess.other-model"),
    "figures of another's hand": (
        "artifacts/semi-trained.json",
        not_the_enclaves,
        IntegrityError,
        "signature.invalid",
    ),
    "another center": ("artifacts/center", other_center, IntegrityError, "release.mismatch"),
    "a part sealed to somebody else": (
        "artifacts/semi-trained/alpha",
        lambda waiting: lambda _: waiting.sealed["beta"],
        IntegrityError,
        "sealed.not-authentic",
    ),
    "a part of another model": ("artifacts/semi-trained/alpha", other_part, IntegrityError, "assess.other-model"),
    "a chain without the assessment": (
        "artifacts/chain.jsonl",
        lambda _: lambda raw: b"".join(line + b"\n" for line in raw.splitlines()[:-1]),
        IntegrityError,
        "assess.other-model",
    ),
    "a chain with a hole": (
        "artifacts/chain.jsonl",
        lambda _: lambda raw: b"".join(line + b"\n" for line in raw.splitlines()[1:]),
        LineageError,
        "chain.broken",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_of_this_model_gets_no_vote(waiting: Waiting, case: str) -> None:
    path, edit, family, code = REFUSED[case]
    waiting.edit[path] = edit(waiting)
    with refused(family, code):
        waiting.assess()
    assert (waiting.posted, waiting.shown) == ([], [])
    assert not [name for name in tree(waiting.alpha.folder) if "exposure-" in str(name)]


@pytest.mark.parametrize("changes", [{"run": "0" * 32}, {"plan": digest("test/v1")}], ids=["run", "plan"])
def test_figures_of_another_run_or_plan_get_no_vote_even_where_the_chain_names_them(
    waiting: Waiting, changes: dict[str, str]
) -> None:
    world = waiting.world
    figures = msgspec.structs.replace(world.statement("assessed-model", AssessedModel), **changes)
    waiting.signed = world.run.vault.signing.sign("assessed-model", figures)
    named = {"statement": digest("assessed-model/v1", canonical_json(figures))}
    world.events.append(world.run.chain.append("assess", named))
    with refused(IntegrityError, "assess.other-model"):
        waiting.assess()
    assert (waiting.posted, waiting.shown) == ([], [])


def test_a_plan_without_a_policy_has_nothing_to_assess(waiting: Waiting) -> None:
    waiting.world.plan = msgspec.structs.replace(waiting.world.plan, exposure=None)
    with refused(ConfigError, "assess.no-policy"):
        waiting.assess()
    assert waiting.posted == []


def test_a_host_that_waits_for_others_is_not_waited_for_longer_than_said(waiting: Waiting) -> None:
    waiting.status = RunStatus(phase="assess", waiting_for=["beta"])
    with refused(EnvironmentFault, "host.too-slow"):
        waiting.assess()
    assert waiting.posted == []


def test_the_runs_own_error_ends_the_wait(waiting: Waiting) -> None:
    error = ProtocolError("exposure.not-assessed", "x", step="train", fix="y").diagnostics()
    waiting.status = RunStatus(phase="failed", error=error)
    with refused(ProtocolError, "exposure.not-assessed"):
        waiting.assess()


def test_a_host_that_is_gone_is_waited_for(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = EnvironmentFault("enclave.died", "x", step="train", fix="y").diagnostics()
    here = waiting.status
    waiting.status = RunStatus(phase="failed", error=gone)

    def comes_back(_seconds: float) -> None:
        waiting.status = here

    monkeypatch.setattr("caltrain.participant.assess.time.sleep", comes_back)
    assert waiting.assess(seconds=60) is not None
