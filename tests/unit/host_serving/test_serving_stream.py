"""Speaking with a serving enclave: order, batches under way, and an enclave that misbehaves or dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from caltrain.boundary import serving as m
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.messages import Attest, Failed, Ready, Stop
from caltrain.boundary.tensors import TensorHead
from caltrain.errors import AccessError, CaltrainError, EnvironmentFault
from caltrain.host.serving.enclave import MAX_ASKED, OnComputed, ServingEnclave
from caltrain.host.serving.faults import Outcome
from support.samples import refused
from support.serving_host import SECONDS, Ended, door

RUN = "5e" * 16
IR = torch.arange(6.0).reshape(2, 3)
NO = AccessError("user.budget-spent", "no", step="admit", fix="Stop.")
NONCE = "0" * 64


class HeldCenter:
    """Doubles what it gets, when the test says so; gives up where it is told to."""

    def __init__(self) -> None:
        self.got: list[tuple[Tensors, OnComputed]] = []
        self.came = threading.Semaphore(0)

    def submit(self, tensors: Tensors, then: OnComputed) -> None:
        """Keep it."""
        self.got.append((tensors, then))
        self.came.release()

    def compute(self, *, fails: bool = False) -> Tensors:
        """Compute the oldest."""
        assert self.came.acquire(timeout=SECONDS)
        tensors, then = self.got.pop(0)
        then(None if fails else tuple(2 * x for x in tensors))
        return tensors


class Stage:
    """The host's end, and the other one in the test's hands."""

    def __init__(self) -> None:
        ours, self.theirs = door()
        self.theirs.settimeout(SECONDS)
        self.program, self.center, self.lost = Ended(self.theirs), HeldCenter(), threading.Semaphore(0)
        self.end = Channel(self.theirs)
        self.enclave = ServingEnclave(
            self.program, Channel(ours), run=RUN, center=self.center, on_lost=self.lost.release
        )

    def heard(self) -> Any:
        """What the host sent next."""
        return self.end.receive_any(m.SERVING_REQUESTS)

    def admit(self, batch: int, rows: int = 2, **refused: dict[str, str]) -> None:
        """Answer an `Infer` that was heard."""
        places = {int(place[1:]): fields for place, fields in refused.items()}
        self.end.send(m.Admitted(batch, places, rows))
        if rows:
            self.end.send_tensors([IR + batch], role="ir", run=RUN, epoch=0, step=batch)


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A stage, cleared afterwards."""
    made = Stage()
    yield made
    made.program.kill()
    made.enclave.stop()
    made.theirs.close()


def result(future: Future[list[Outcome]]) -> list[Outcome]:
    """What came of a batch."""
    return future.result(SECONDS)


def codes(outcomes: list[Outcome]) -> list[str | bytes]:
    """Answers, and the codes of errors."""
    return [outcome.code if isinstance(outcome, CaltrainError) else outcome for outcome in outcomes]


def test_questions_are_answered_in_the_order_of_asking(stage: Stage) -> None:
    first, second = stage.enclave.ask(Attest("serving", NONCE)), stage.enclave.ask(m.CloseSession("ab" * 16))
    assert [stage.heard(), stage.heard()] == [Attest("serving", NONCE), m.CloseSession("ab" * 16)]
    stage.end.send(m.Served(session="one"))
    stage.end.send(Failed(NO.diagnostics(), fatal=False))
    assert first.result(SECONDS).session == "one"
    with refused(AccessError, "user.budget-spent"):
        second.result(SECONDS)


def test_a_batch_goes_into_the_enclave_through_the_center_and_back(stage: Stage) -> None:
    future = stage.enclave.infer([b"a", b"b", b"c"])
    assert stage.heard() == m.Infer(0, (b"a", b"b", b"c"))
    stage.admit(0, p1=NO.diagnostics())
    (given,) = stage.center.compute()
    assert torch.equal(given, IR)
    head, (out,) = stage.heard()
    assert isinstance(head, TensorHead)
    assert (head.role, head.run, head.epoch, head.step) == ("center-out", RUN, 0, 0)
    assert torch.equal(out, 2 * IR)
    stage.end.send(m.Answered(0, {0: b"A", 2: b"C", 1: b"not its", 9: b"nobody's"}))
    assert codes(result(future)) == [b"A", "user.budget-spent", b"C"]


def test_the_next_batch_enters_while_the_center_computes_and_each_gets_its_own(stage: Stage) -> None:
    first, second = stage.enclave.infer([b"a"]), stage.enclave.infer([b"b"])
    assert [stage.heard().batch, stage.heard().batch] == [0, 1]
    stage.admit(0)
    stage.admit(1)
    for batch in (0, 1):
        stage.center.compute()
        head, (out,) = stage.heard()
        assert head.step == batch
        assert torch.equal(out, 2 * (IR + batch))
    stage.end.send(m.Answered(0, {0: b"A"}))
    stage.end.send(m.Answered(1, {0: b"B"}))
    assert (result(first), result(second)) == ([b"A"], [b"B"])


def test_a_batch_of_which_nothing_was_admitted_ends_there(stage: Stage) -> None:
    future = stage.enclave.infer([b"a"])
    stage.heard()
    stage.admit(0, rows=0, p0=NO.diagnostics())
    assert codes(result(future)) == ["user.budget-spent"]
    assert stage.center.got == []


def test_a_center_that_cannot_compute_gives_the_batch_up_and_the_next_one_is_computed(stage: Stage) -> None:
    future = stage.enclave.infer([b"a", b"b"])
    stage.heard()
    stage.admit(0, p1=NO.diagnostics())
    stage.center.compute(fails=True)
    assert stage.heard() == m.Abandon(0)
    stage.end.send(m.Answered(0))
    assert codes(result(future)) == ["center.failed", "user.budget-spent"]
    again = stage.enclave.infer([b"a"])
    stage.heard()
    stage.admit(1)
    stage.center.compute()
    stage.heard()
    stage.end.send(m.Answered(1, {0: b"A"}))
    assert result(again) == [b"A"]


def test_an_error_of_the_whole_batch_is_each_requests(stage: Stage) -> None:
    wrong = EnvironmentFault("center.wrong", "no", step="finish", fix="Report it.")
    future = stage.enclave.infer([b"a", b"b"])
    stage.heard()
    stage.admit(0)
    stage.center.compute()
    stage.heard()
    stage.end.send(m.Answered(0, error=wrong.diagnostics()))
    assert codes(result(future)) == ["center.wrong"] * 2
    future = stage.enclave.infer([b"a"])
    stage.heard()
    stage.end.send(Failed(NO.diagnostics(), fatal=False))
    with refused(AccessError, "user.budget-spent"):
        result(future)


def test_too_much_at_a_time_is_told_to_come_back_and_nothing_of_it_is_sent(stage: Stage) -> None:
    asked = [stage.enclave.ask(Attest("serving", NONCE)) for _ in range(MAX_ASKED)]
    with refused(EnvironmentFault, "serving.busy"):
        stage.enclave.ask(Attest("serving", NONCE)).result(SECONDS)
    batches = [stage.enclave.infer([b"a"]) for _ in range(m.MAX_BATCHES)]
    with refused(EnvironmentFault, "serving.busy"):
        result(stage.enclave.infer([b"a"]))
    for _ in asked:
        assert isinstance(stage.heard(), Attest)
        stage.end.send(m.Served())
    for number, _ in enumerate(batches):
        assert stage.heard().batch == number
        stage.admit(number, rows=0, p0=NO.diagnostics())
    for future in asked:
        future.result(SECONDS)
    for batch in batches:
        result(batch)
    assert not stage.enclave.ask(m.CloseSession("ab" * 16)).done()
    assert isinstance(stage.heard(), m.CloseSession)


Misbehaves = Callable[[Channel], None]
READY = Ready("sha384:" + "0" * 96, simulated=True, sandbox={})


def _ir(**changes: Any) -> Misbehaves:
    head: dict[str, Any] = {"role": "ir", "run": RUN, "epoch": 0, "step": 0} | changes

    def send(end: Channel) -> None:
        end.send(m.Admitted(0, rows=1))
        end.send_tensors([IR], **head)

    return send


def _twice(end: Channel) -> None:
    end.send(m.Admitted(0, rows=1))
    end.send(m.Served())


WRONG: dict[str, Misbehaves] = {
    "another kind of answer": lambda end: end.send(m.Served()),
    "another batch": lambda end: end.send(m.Admitted(1)),
    "the answer before the admission": lambda end: end.send(m.Answered(0, {0: b"A"})),
    "first words again": lambda end: end.send(READY),
    "an IR that was not announced": lambda end: end.send_tensors([IR], role="ir", run=RUN, epoch=0, step=0),
    "a message in place of the IR": _twice,
    "an IR of another batch": _ir(step=1),
    "an IR of another package": _ir(run="00" * 16),
    "tensors of another role": _ir(role="eval-ir"),
    "a message of the host's": lambda end: end.send(Stop()),
    "nothing of one request": lambda end: end.send(m.Admitted(0, {0: NO.diagnostics()})),
    "its end": lambda end: end.close(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_enclave_that_misbehaves_or_ends_is_killed_and_all_that_waits_is_told(stage: Stage, wrong: str) -> None:
    future, asked = stage.enclave.infer([b"a", b"b"]), stage.enclave.ask(Attest("serving", NONCE))
    stage.heard()
    WRONG[wrong](stage.end)
    with refused(EnvironmentFault, "serving.restarted"):
        result(future)
    with refused(EnvironmentFault, "serving.restarted"):
        asked.result(SECONDS)
    assert stage.lost.acquire(timeout=SECONDS)
    assert stage.program.killed
    assert stage.center.got == []
    for later in (stage.enclave.infer([b"a"]), stage.enclave.ask(Attest("serving", NONCE))):
        with refused(EnvironmentFault, "serving.restarted"):
            later.result(0)
    assert not stage.lost.acquire(blocking=False), "told once"


def test_a_center_that_ends_after_the_enclave_did_disturbs_nobody(stage: Stage) -> None:
    future = stage.enclave.infer([b"a"])
    stage.heard()
    stage.admit(0)
    assert stage.center.came.acquire(timeout=SECONDS)
    stage.center.came.release()
    stage.program.kill()
    assert stage.lost.acquire(timeout=SECONDS)
    stage.center.compute()
    with refused(EnvironmentFault, "serving.restarted"):
        result(future)


def test_an_answer_that_nobody_asked_for_ends_it(stage: Stage) -> None:
    stage.end.send(m.Served())
    assert stage.lost.acquire(timeout=SECONDS)


def test_it_is_asked_to_stop_and_its_end_is_waited_for(stage: Stage) -> None:
    stopping = threading.Thread(target=stage.enclave.stop)
    stopping.start()
    assert stage.heard() == Stop()
    assert stopping.is_alive()
    stage.end.close()
    stopping.join(SECONDS)
    assert not stopping.is_alive()


def test_one_that_does_not_stop_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caltrain.host.serving.stream._STOP_SECONDS", 0.05)
    stage.enclave.stop()
    assert stage.program.killed
