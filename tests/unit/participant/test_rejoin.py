"""A party's word for a run that was interrupted: what it checks first, and that a refusal sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.attestation.evidence import EvidenceBundle, Nonce, Purpose
from caltrain.boundary import messages as m
from caltrain.crypto.dsse import Envelope, SigningKey
from caltrain.enclave.run import State
from caltrain.errors import (
    AccessError,
    AttestationError,
    CaltrainError,
    ConfigError,
    EnvironmentFault,
    IntegrityError,
    LineageError,
    ProtocolError,
    ProvisioningError,
    from_wire,
)
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.cut import agree_to_cut
from caltrain.participant.heads import Lookout, look
from caltrain.participant.identity import Identity
from caltrain.participant.journal import KeptRun, count_word, keep_run, kept_run
from caltrain.participant.rejoin import Rejoined, rejoin
from caltrain.plan import CutApproval
from caltrain.provenance.chain import Chain, empty_head
from support.disk import tree
from support.folders import identity_of, policy_of, signed_manifest
from support.members import Member
from support.samples import refused
from support.world import World

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OTHER = "sha256:" + "0" * 64
Change = Callable[[Any], Any]


class Resumed:
    """Alpha, whose run was killed after an epoch; the host serves it again. `edit` changes answers by path."""

    def __init__(self, folder: Path) -> None:
        self.world = World().run_to(State.READY)
        self.world.train()
        self.alpha: Identity = identity_of(self.world.parties["alpha"], folder)
        self.plan, self.policy = self.world.plan, policy_of(self.world)
        self.manifest, self.signing = signed_manifest(self.world), self.world.run.vault.signing
        self.run = self.world.manifest.run
        countersigned = KeptRun(
            plan=self.plan.digest(),
            manifest=self.world.manifest.digest(),
            signing_key=self.signing.public,
            head=empty_head(self.run),
        )
        keep_run(folder, self.run, countersigned)
        self.world.restart()
        self.world.done(self.world.resume())
        self.status = RunStatus(phase="resume", waiting_for=["alpha", "beta", "gamma"])
        self.edit: dict[str, Change] = {}
        self.posted: list[tuple[str, Envelope]] = []

    def client(self) -> HostClient:
        """A connection to the host."""
        return HostClient("http://host", transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/v1/")
        try:
            body = self._body(path, request)
        except CaltrainError as error:
            return httpx.Response(409, content=msgspec.json.encode({"error": error.diagnostics()}))
        body = self.edit.get(path, lambda same: same)(body)
        return httpx.Response(200, content=body if isinstance(body, bytes) else msgspec.json.encode(body))

    def _body(self, path: str, request: httpx.Request) -> Any:
        match path.split("/"):
            case ["run"]:
                return self.status
            case ["manifest"]:
                return self.manifest
            case ["attestation"]:
                return self._ask(m.Attest(*msgspec.convert(tuple(request.url.params.values()), tuple[Purpose, Nonce])))
            case ["artifacts", "chain.jsonl"]:
                return b"".join(msgspec.json.encode(event) + b"\n" for event in self.world.events)
            case ["parties", _, what]:
                self.posted.append((what, msgspec.json.decode(request.read(), type=Envelope)))
                if what == "rejoin":
                    self._ask(m.Rejoin("alpha", self.posted[-1][1]))
                return {}
        raise AssertionError(path)

    def _ask(self, request: m.Request) -> EvidenceBundle | None:
        reply = self.world.send(request)
        if isinstance(reply, m.Failed):
            raise from_wire(reply.error)
        assert isinstance(reply, m.Done)
        return reply.bundle

    def rejoin(self, **changes: Any) -> Rejoined | None:
        """Alpha gives its word."""
        options: dict[str, Any] = {"clock": lambda: NOW, "seconds": 0} | changes
        with self.client() as client:
            return rejoin(client, self.plan, self.alpha, self.policy, **options)

    def refused(self, family: type[CaltrainError], code: str) -> None:
        """No word is given: nothing is sent, nothing kept."""
        before = tree(self.alpha.folder)
        with refused(family, code):
            self.rejoin()
        assert self.posted == []
        assert tree(self.alpha.folder) == before


def kept_now(resumed: Resumed) -> KeptRun:
    kept = kept_run(resumed.alpha.folder, resumed.run)
    assert kept is not None
    return kept


@pytest.fixture
def resumed(tmp_path: Path) -> Resumed:
    """A run that waits for words."""
    return Resumed(tmp_path / "alpha")


def test_with_every_partys_word_the_run_goes_on(resumed: Resumed) -> None:
    word = resumed.rejoin()
    world = resumed.world
    assert word == Rejoined(
        run=resumed.run,
        head=world.host_head,
        events=len(world.events),
        at=(1, 0),
        resumed=0,
        stopped=(),
        words=1,
        simulated=True,
    )
    assert (kept_now(resumed).head, kept_now(resumed).events) == (word.head, word.events)
    for other in ("beta", "gamma"):
        done = world.done(world.rejoin(other))
    assert done.at == (1, 0)
    assert world.chain_of_host()[-1].kind == "resume"


def test_the_word_holds_neither_key_nor_head_in_clear(resumed: Resumed) -> None:
    resumed.rejoin()
    (sent,) = [msgspec.json.encode(envelope) for _, envelope in resumed.posted]
    for secret in (resumed.alpha.data_key, resumed.alpha.data_key.hex().encode(), resumed.world.host_head.encode()):
        assert secret not in sent


@pytest.mark.parametrize(
    "status",
    [RunStatus(phase="train"), RunStatus(phase="linked"), RunStatus(phase="resume", waiting_for=["beta"])],
)
def test_a_party_that_is_not_waited_for_sends_nothing(resumed: Resumed, status: RunStatus) -> None:
    resumed.status = status
    assert resumed.rejoin() is None
    assert resumed.posted == []


def test_a_host_that_begins_a_new_run_gets_no_word(resumed: Resumed) -> None:
    resumed.status = RunStatus(phase="approvals")
    resumed.refused(ProtocolError, "rejoin.not-asked")


def test_a_run_that_this_party_never_countersigned_gets_no_word(resumed: Resumed) -> None:
    (resumed.alpha.folder / "heads.json").unlink()
    resumed.refused(LineageError, "run.unknown")


def test_what_was_kept_and_is_damaged_is_not_nothing(resumed: Resumed) -> None:
    (resumed.alpha.folder / "heads.json").write_bytes(b"{")
    resumed.refused(ConfigError, "journal.heads-unreadable")


def test_another_manifest_of_that_run_gets_no_word(resumed: Resumed) -> None:
    kept = msgspec.structs.replace(kept_now(resumed), manifest=OTHER)
    (resumed.alpha.folder / "heads.json").write_bytes(msgspec.json.encode({resumed.run: kept}))
    resumed.refused(IntegrityError, "rejoin.other-manifest")


def test_another_plan_of_that_party_gets_no_word(resumed: Resumed) -> None:
    resumed.plan = msgspec.structs.replace(resumed.plan, name="another")
    resumed.refused(IntegrityError, "rejoin.other-manifest")


def test_a_party_with_another_key_gives_no_word(resumed: Resumed, tmp_path: Path) -> None:
    resumed.alpha = identity_of(Member("alpha"), tmp_path / "other")
    resumed.refused(ProvisioningError, "plan.other-key")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"allow_simulated": False}, "evidence.simulated"),
        ({"measurements": ("sha384:" + "cd" * 48,)}, "evidence.other-measurement"),
        ({"simulated_roots": ()}, "evidence.unknown-root"),
    ],
)
def test_an_enclave_that_the_policy_does_not_accept_gets_no_word(
    resumed: Resumed, changes: dict[str, Any], code: str
) -> None:
    resumed.policy = msgspec.structs.replace(resumed.policy, **changes)
    resumed.refused(AttestationError, code)


def test_evidence_for_another_purpose_gets_no_word(resumed: Resumed) -> None:
    def training(bundle: EvidenceBundle) -> EvidenceBundle:
        return msgspec.structs.replace(bundle, binding=msgspec.structs.replace(bundle.binding, purpose="training"))

    resumed.edit["attestation"] = training
    resumed.refused(AttestationError, "evidence.other-purpose")


def test_a_program_that_we_accept_but_the_plan_does_not_name_gets_no_word(
    resumed: Resumed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(measurement: str, plan: object) -> None:
        raise AttestationError("evidence.not-the-plans", f"{measurement}, {plan}", step="t", fix="t")

    monkeypatch.setattr("caltrain.participant.rejoin.match_plan", named)
    resumed.refused(AttestationError, "evidence.not-the-plans")


# -- the chain ---------------------------------------------------------------------------------------------------


def looked(resumed: Resumed) -> None:
    """Alpha has seen the chain to its end."""
    with resumed.client() as client:
        look(client, resumed.alpha, resumed.run)


def test_a_chain_that_was_cut_back_behind_the_kept_head_gets_no_word(resumed: Resumed) -> None:
    looked(resumed)
    del resumed.world.events[-1]
    resumed.refused(LineageError, "chain.rolled-back")


def test_a_chain_that_was_forked_gets_no_word(resumed: Resumed) -> None:
    looked(resumed)
    events = resumed.world.chain_of_host()
    fork = Chain(resumed.signing, run=resumed.run, events=events[:-1])
    body = events[-1].body | {"sealed": OTHER}
    resumed.world.events[-1:] = [fork.append("checkpoint", body), fork.append("checkpoint", body)]
    resumed.refused(LineageError, "chain.forked")


def test_a_party_that_never_looked_cannot_notice(resumed: Resumed) -> None:
    kinds = [event.kind for event in resumed.world.chain_of_host()]
    earlier = [n for n, kind in enumerate(kinds) if kind == "checkpoint"][-2]
    del resumed.world.events[earlier + 1 :]
    word = resumed.rejoin()  # the enclave finds it out: its checkpoint is a newer one
    assert word is not None
    assert word.events == earlier + 1


@pytest.mark.parametrize(
    ("change", "code", "family"),
    [
        (lambda raw: raw.replace(b"\n", b"", 1), "envelope.malformed", IntegrityError),
        (lambda raw: raw.partition(b"\n")[2], "chain.broken", LineageError),
        (lambda _: b"[]\n", "envelope.malformed", IntegrityError),
    ],
)
def test_a_chain_that_does_not_hold_gets_no_word(
    resumed: Resumed, change: Change, code: str, family: type[CaltrainError]
) -> None:
    resumed.edit["artifacts/chain.jsonl"] = change
    resumed.refused(family, code)


def test_a_chain_of_another_enclave_gets_no_word(resumed: Resumed) -> None:
    chain = Chain(SigningKey(), run=resumed.run)
    resumed.world.events[:] = [chain.append("checkpoint", {"sealed": OTHER})]
    resumed.refused(IntegrityError, "signature.invalid")


def test_a_chain_without_a_checkpoint_gets_no_word(resumed: Resumed) -> None:
    del resumed.world.events[3:]
    before = tree(resumed.alpha.folder)
    with refused(LineageError, "rejoin.nothing"):
        resumed.rejoin()
    assert resumed.posted == []
    assert tree(resumed.alpha.folder).keys() == before.keys()  # that much of the chain was verified, and is kept


def test_a_kept_head_is_never_replaced_by_an_older_one(resumed: Resumed) -> None:
    looked(resumed)
    newest = kept_now(resumed)
    keep_run(resumed.alpha.folder, resumed.run, msgspec.structs.replace(newest, events=1, head=OTHER))
    assert kept_now(resumed) == newest


def test_earlier_restarts_are_counted(resumed: Resumed) -> None:
    resumed.rejoin()
    world = resumed.world
    for other in ("beta", "gamma"):
        world.done(world.rejoin(other))
    world.restart()
    world.done(world.resume())
    word = resumed.rejoin()
    assert word is not None
    assert word.resumed == 1


def test_words_for_one_head_are_counted_before_they_leave(resumed: Resumed) -> None:
    for number in (1, 2):  # the enclave that got the first one never went on: the chain stands where it stood
        if number == 2:
            resumed.world.restart()
            resumed.world.done(resumed.world.resume())
        word = resumed.rejoin()
        assert word is not None
        assert (word.words, kept_now(resumed).words) == (number, number)
    looked(resumed)
    assert kept_now(resumed).words == 2  # it was no other head
    for other in ("beta", "gamma"):
        resumed.world.done(resumed.world.rejoin(other))
    looked(resumed)
    assert kept_now(resumed).words == 0


def test_a_word_that_the_host_does_not_take_is_counted_too(resumed: Resumed) -> None:
    def lost(_: Any) -> Any:
        raise httpx.ReadError("the connection breaks while the word is on its way")

    resumed.edit["parties/alpha/rejoin"] = lost
    with refused(EnvironmentFault, "host.unreachable"):
        resumed.rejoin()
    assert kept_now(resumed).words == 1


def test_no_word_is_counted_for_a_head_that_is_no_longer_the_newest(resumed: Resumed) -> None:
    looked(resumed)
    before = tree(resumed.alpha.folder)
    with refused(LineageError, "chain.rolled-back"):
        count_word(resumed.alpha.folder, resumed.run, head=OTHER)
    with refused(LineageError, "chain.rolled-back"):
        count_word(resumed.alpha.folder, "0" * 32, head=OTHER)
    assert tree(resumed.alpha.folder) == before


# -- looking while waiting ---------------------------------------------------------------------------------------


def test_a_lookout_looks_at_each_new_place_and_then_rests(resumed: Resumed) -> None:
    now, fetched = [0.0], []

    def slow(raw: bytes) -> bytes:
        now[0] += 1.0
        fetched.append(now[0])
        return raw

    resumed.edit["artifacts/chain.jsonl"] = slow
    with resumed.client() as client:
        lookout = Lookout(client, resumed.alpha, resumed.run, clock=lambda: now[0])
        for phase, epoch, wait, looks in (
            ("train", 1, 0, 1),
            ("train", 1, 1000, 1),
            ("train", 2, 0, 2),
            ("train", 3, 49, 2),
            ("train", 3, 2, 3),
        ):
            now[0] += wait
            lookout(RunStatus(phase=phase, epoch=epoch))
            assert len(fetched) == looks
    assert kept_now(resumed).events == len(resumed.world.events)


# -- a shallower cut ---------------------------------------------------------------------------------------------


def agree(resumed: Resumed, front: int) -> str:
    with resumed.client() as client:
        return agree_to_cut(client, resumed.plan, resumed.alpha, front=front, seconds=0)


def test_a_party_agrees_to_the_cut_that_is_asked_for_at_this_place_of_the_chain(resumed: Resumed) -> None:
    resumed.status = RunStatus(phase="cut", cut=1, waiting_for=["alpha"])
    head = agree(resumed, 1)
    ((what, envelope),) = resumed.posted
    due = CutApproval(run=resumed.run, head=resumed.world.host_head, party="alpha", front=1)
    assert (what, head) == ("cut", due.head)
    assert envelope == resumed.alpha.signer.sign("move-cut", due)


def test_a_party_does_not_agree_to_another_cut_or_to_a_chain_that_was_cut_back(resumed: Resumed) -> None:
    resumed.status = RunStatus(phase="cut", cut=1, waiting_for=["alpha"])
    with refused(AccessError, "cut.other-asked"):
        agree(resumed, 2)
    looked(resumed)
    del resumed.world.events[-1]
    with refused(LineageError, "chain.rolled-back"):
        agree(resumed, 1)
    assert resumed.posted == []
