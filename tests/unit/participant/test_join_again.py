"""A join that ended after it countersigned is started again: it waits for the run, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from caltrain.crypto.dsse import Envelope
from caltrain.enclave.run import State
from caltrain.errors import CaltrainError, EnvironmentFault, IntegrityError, LineageError, ProvisioningError
from caltrain.host_client import RunStatus
from caltrain.participant.identity import Identity
from caltrain.participant.join import join
from caltrain.participant.journal import KeptRun, keep_run, kept_run, remember_manifest
from caltrain.plan import RunManifest
from caltrain.provenance.chain import empty_head
from support.disk import tree
from support.folders import identity_of, policy_of
from support.members import Member
from support.samples import refused
from support.scripted_host import ScriptedHost
from support.world import World

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AGAIN = "countersigned already: waiting for the run's end"


@pytest.fixture(autouse=True)
def _nobody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


class Again:
    """Alpha, whose join was killed after it countersigned; the run has come to its end meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.world = World().run_to(State.LINKED)
        self.host = ScriptedHost(self.world, joining="alpha")
        self.alpha: Identity = identity_of(self.world.parties["alpha"], folder)
        self.manifest, self.plan = self.world.manifest, self.world.plan
        self.remembered(self.manifest)
        self.kept(self.manifest)
        self.steps: list[str] = []

    def remembered(self, manifest: RunManifest) -> None:
        """As if alpha were about to countersign that."""
        remember_manifest(self.alpha.folder, plan=self.plan.digest(), manifest=manifest.digest(), allow_second=True)

    def kept(self, manifest: RunManifest, *, noted: str = "") -> None:
        """As if alpha had countersigned that."""
        kept = KeptRun(
            plan=self.plan.digest(),
            manifest=noted or manifest.digest(),
            signing_key=manifest.enclave_signing_key,
            head=empty_head(manifest.run),
        )
        keep_run(self.alpha.folder, manifest.run, kept)

    def says(self, *answers: RunStatus | CaltrainError | None) -> None:
        """What the host says of the run one after the other (None: it is gone), and then the truth."""
        left = list(answers)

        def answer(truth: bytes) -> bytes:
            if not left:
                return truth
            said = left.pop(0)
            if said is None:
                raise httpx.ConnectError("nobody is there")
            if isinstance(said, CaltrainError):
                said = RunStatus(phase="failed", error=said.diagnostics())
            return msgspec.json.encode(said)

        self.host.edit["/v1/run"] = answer

    def join(self, **more: Any) -> RunManifest:
        """Start it again."""
        options: dict[str, Any] = {"clock": lambda: NOW, "seconds": 60, "on_step": self.steps.append} | more
        with self.host.client() as client:
            return join(client, self.plan, self.alpha, policy_of(self.world), **options)

    def received(self) -> None:
        """Alpha has the model, and has sent nothing for it."""
        folder = self.alpha.folder / "runs" / self.manifest.run
        assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "run.json", "chain.jsonl"}
        assert {method for method, _ in self.host.requests} == {"GET"}
        assert not any(self.host.bodies)

    def refused(self, family: type[CaltrainError], code: str, **more: Any) -> None:
        """It does not join: nothing is sent, nothing kept."""
        before = tree(self.alpha.folder)
        with refused(family, code):
            self.join(**more)
        assert {method for method, _ in self.host.requests} <= {"GET"}
        assert tree(self.alpha.folder) == before


@pytest.fixture
def again(tmp_path: Path) -> Again:
    """A party that was interrupted."""
    return Again(tmp_path / "alpha")


@pytest.mark.parametrize("allow", [False, True])
def test_a_run_that_is_linked_is_received(again: Again, allow: bool) -> None:
    assert again.join(allow_second_manifest=allow) == again.manifest
    again.received()
    assert again.steps == [AGAIN, "received and joined the model, kept the head of the chain"]


def test_the_run_is_waited_for_and_its_chain_is_followed(again: Again) -> None:
    again.says(
        None,
        EnvironmentFault("enclave.died", "gone", step="train", fix="Resume."),
        RunStatus(phase="starting"),
        RunStatus(phase="resume", waiting_for=["alpha"]),
        RunStatus(phase="resume", waiting_for=["alpha"]),
        RunStatus(phase="train", epoch=1),
        None,
        RunStatus(phase="countersignatures", waiting_for=["beta"]),
    )
    assert again.join() == again.manifest
    again.received()
    assert [step.partition(";")[0].partition(":")[0] for step in again.steps] == [
        "the host does not answer",
        "the enclave has ended",
        "the run goes on",
        "countersigned already",
        "the run waits for your word",
        "the run goes on",
        "the host does not answer",
        "the run goes on",
        "received and joined the model, kept the head of the chain",
    ]
    kept = kept_run(again.alpha.folder, again.manifest.run)
    assert kept is not None
    assert kept.head == again.world.host_head


def test_a_host_that_is_gone_before_it_shows_the_manifest_is_waited_for(again: Again) -> None:
    answers: list[Callable[[bytes], bytes]] = []

    def once(body: bytes) -> bytes:
        answers.append(bytes)
        if len(answers) == 1:
            raise httpx.ReadError("the connection breaks")
        return body

    again.host.edit["/v1/manifest"] = once
    assert again.join() == again.manifest
    assert len(answers) == 2
    again.received()


def test_a_host_that_stays_away_is_given_up(again: Again) -> None:
    again.says(*[None] * 3)
    again.refused(EnvironmentFault, "host.unreachable", seconds=0)


def test_shards_are_not_needed_any_more(again: Again) -> None:
    for path in (again.alpha.folder / "shards").iterdir():
        path.unlink()
    assert again.join() == again.manifest


# -- refusals ----------------------------------------------------------------------------------------------------


def shows(again: Again, manifest: RunManifest) -> None:
    """The host shows that one, signed by the key that it names."""
    again.host.edit["/v1/manifest"] = lambda _: msgspec.json.encode(
        again.world.run.vault.signing.sign("run-manifest", manifest)
    )


def test_another_manifest_of_the_plan_is_refused(again: Again) -> None:
    shows(again, msgspec.structs.replace(again.manifest, run="f" * 32))
    again.refused(ProvisioningError, "manifest.second")


def test_another_manifest_is_refused_though_it_was_kept_once(again: Again) -> None:
    other = msgspec.structs.replace(again.manifest, run="f" * 32)
    again.kept(other)
    again.remembered(other)
    again.refused(ProvisioningError, "manifest.second")


@pytest.mark.parametrize("phase", ["approvals", "provisioning"])
def test_a_host_that_has_begun_another_run_is_refused(again: Again, phase: str) -> None:
    again.says(*[RunStatus(phase=phase)] * 9)
    again.refused(ProvisioningError, "manifest.second")


def test_a_run_that_is_not_in_the_partys_notes_is_refused(again: Again) -> None:
    (again.alpha.folder / "heads.json").unlink()
    again.refused(LineageError, "run.unknown")


def test_notes_that_do_not_agree_are_refused(again: Again) -> None:
    (again.alpha.folder / "heads.json").unlink()
    again.kept(again.manifest, noted="sha256:" + "0" * 64)
    again.refused(IntegrityError, "rejoin.other-manifest")


def test_a_signature_that_did_not_arrive_is_not_waited_for(again: Again) -> None:
    again.says(*[RunStatus(phase="countersignatures", waiting_for=["alpha", "beta"])] * 9)
    again.refused(ProvisioningError, "join.too-late")


def test_a_run_that_has_failed_fails_by_the_same_name(again: Again) -> None:
    again.says(LineageError("audit.other-result", "no", step="audit", fix="Stop."))
    again.refused(LineageError, "audit.other-result")


def test_a_party_with_another_key_asks_for_nothing(again: Again) -> None:
    other = Member("alpha")
    again.alpha = Identity(again.alpha.folder, "alpha", other.signer, other.data_key)
    again.refused(ProvisioningError, "plan.other-key")
    assert again.host.requests == []


def test_a_manifest_that_nobody_signed_is_refused(again: Again) -> None:
    other = again.world.run.vault.signing.sign("model", again.manifest)

    def unsigned(body: bytes) -> bytes:
        shown = msgspec.json.decode(body, type=Envelope)
        return msgspec.json.encode(msgspec.structs.replace(shown, signatures=other.signatures))

    again.host.edit["/v1/manifest"] = unsigned
    again.refused(IntegrityError, "signature.invalid")
