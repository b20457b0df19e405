"""Waiting through deaths: what passes, what ends the wait, and what the party is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import msgspec
import pytest

from caltrain.errors import CaltrainError, EnvironmentFault, IntegrityError, LineageError, ProvisioningError
from caltrain.host_client import HostClient, RunStatus
from caltrain.participant.waiting import wait_through
from support.samples import refused

DIED = EnvironmentFault("enclave.died", "gone", step="train", fix="Resume.")
NOT_UP = EnvironmentFault("enclave.did-not-start", "killed", step="launch enclave", fix="Resume.")
CAUGHT = IntegrityError("audit.other-result", "no", step="audit", fix="Stop.")


@pytest.fixture(autouse=True)
def _nobody_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)


class Host:
    """Says one thing after the other of its run; None: it does not answer."""

    def __init__(self, *says: RunStatus | CaltrainError | None) -> None:
        self._says: Iterator[RunStatus | CaltrainError | None] = iter(says)
        self.steps: list[str] = []
        self.seen: list[str] = []

    def _answer(self, _: httpx.Request) -> httpx.Response:
        said = next(self._says)
        if said is None:
            raise httpx.ConnectError("nobody is there")
        status = RunStatus(phase="failed", error=said.diagnostics()) if isinstance(said, CaltrainError) else said
        return httpx.Response(200, content=msgspec.json.encode(status))

    def wait(self, *, seconds: float = 60, fails: CaltrainError | None = None) -> RunStatus:
        def on_status(status: RunStatus) -> None:
            self.seen.append(status.phase)
            if fails is not None:
                raise fails

        with HostClient("http://host", transport=httpx.MockTransport(self._answer)) as client:
            return wait_through(
                client,
                {"linked"},
                party="alpha",
                deadline=time.monotonic() + seconds,
                on_status=on_status,
                on_step=self.steps.append,
            )


def phase(name: str, *waiting: str) -> RunStatus:
    return RunStatus(phase=name, waiting_for=list(waiting))


def test_deaths_of_host_and_enclave_pass_and_each_is_told_once() -> None:
    host = Host(phase("train"), None, None, phase("train"), DIED, DIED, NOT_UP, None, phase("release"), phase("linked"))
    assert host.wait().phase == "linked"
    assert [step.partition(";")[0] for step in host.steps] == [
        "the host does not answer",
        "the run goes on",
        "the enclave has ended",
        "the enclave has not started",
        "the host does not answer",
        "the run goes on",
    ]
    assert host.seen == ["train", "train", "release", "linked"]


@pytest.mark.parametrize(("where", "command"), [("resume", "party rejoin"), ("cut", "party agree-cut")])
def test_a_party_that_is_waited_for_is_told_the_command(where: str, command: str) -> None:
    host = Host(phase(where, "alpha", "beta"), phase(where, "alpha"), phase(where, "beta"), phase("linked"))
    host.wait()
    assert host.steps == [f"the run waits for your word: caltrain {command}", "the run goes on"]


def test_another_failure_of_the_run_ends_the_wait() -> None:
    with refused(IntegrityError, "audit.other-result"):
        Host(phase("train"), CAUGHT).wait()


def test_another_fault_of_a_machine_ends_the_wait_too() -> None:
    full = EnvironmentFault("storage.full", "no room", step="train", fix="Free some.")
    with refused(EnvironmentFault, "storage.full"):
        Host(phase("train"), full).wait()


def test_what_the_look_at_the_chain_finds_ends_the_wait() -> None:
    with refused(LineageError, "chain.rolled-back"):
        Host(phase("train")).wait(fails=LineageError("chain.rolled-back", "older", step="look", fix="Refuse."))


@pytest.mark.parametrize("begun", ["approvals", "provisioning"])
def test_a_host_that_begins_another_run_ends_the_wait(begun: str) -> None:
    host = Host(None, phase(begun))
    with refused(ProvisioningError, "join.begun-anew"):
        host.wait()
    assert host.seen == []


@pytest.mark.parametrize(
    ("said", "code"), [(None, "host.unreachable"), (DIED, "enclave.died"), (phase("train"), "host.too-slow")]
)
def test_after_the_deadline_what_is_still_wrong_is_raised(said: RunStatus | CaltrainError | None, code: str) -> None:
    with refused(EnvironmentFault, code):
        Host(said).wait(seconds=-1)
