"""Speaking with the enclave program: one conversation at a time, its calls served, its end noticed and named."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from caltrain.boundary import messages as m
from caltrain.boundary.channel import Channel
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.dsse import Envelope
from caltrain.errors import EnvironmentFault, IntegrityError, ProtocolError
from caltrain.host import launcher
from caltrain.host.confine import Confinement
from caltrain.host.launcher import Enclave, launch
from caltrain.host.store import Store
from support.disk import tree
from support.samples import refused, signer

SECONDS = 20
READY = m.Ready("sha384:" + "0" * 96, simulated=True, sandbox={})
ASKED = m.Link()
EVENT = signer("enclave").sign("event", {"n": 1})
Play = Callable[[Channel], None]


class Stage:
    """A host's end of the door; the other end is played by the test, and a sleeping program stands for the enclave."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.settimeout(SECONDS)
        self.other = Channel(theirs)
        self.progress: list[m.Progress] = []
        self.events: list[Envelope] = []
        self.process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
        self.enclave = Enclave(
            self.process, Channel(ours), Store(folder), READY, self.progress.append, self.events.extend
        )
        self._thread = threading.Thread()

    def play(self, play: Play) -> None:
        """What the enclave does once it has been asked."""

        def run() -> None:
            assert self.other.receive(m.REQUESTS) == ASKED
            play(self.other)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def end(self) -> None:
        """Leave nothing behind."""
        self.other.close()
        self.process.kill()
        self.process.wait()
        self.enclave.channel.close()
        if self._thread.ident is not None:
            self._thread.join(SECONDS)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A stage, cleared afterwards."""
    made = Stage(tmp_path / "host")
    yield made
    made.end()


def test_calls_are_served_until_the_reply_comes(stage: Stage) -> None:
    answers: list[Any] = []

    def play(end: Channel) -> None:
        for call in (m.Write("pool-0", 2, b"cd"), m.Write("pool-0", 0, b"ab"), m.Read("pool-0", 1, 9)):
            end.send(call)
            answers.append(end.receive(m.ANSWERS))
        end.send(m.Progress("link", 1, 2))
        end.send(m.Done(events=(EVENT,), loss=0.5))

    stage.play(play)
    assert stage.enclave.request(ASKED).loss == 0.5
    assert answers == [m.Data(), m.Data(), m.Data(b"bcd")]
    assert stage.progress == [m.Progress("link", 1, 2)]
    assert stage.events == [EVENT]


def test_a_call_that_the_host_cannot_serve_is_answered_with_its_error(stage: Stage) -> None:
    answers: list[Any] = []

    def play(end: Channel) -> None:
        for call in (m.Read("center", 0, 9), m.Write("a/../../b", 0, b"x"), m.CommitCenter(0)):
            end.send(call)
            answers.append(end.receive(m.ANSWERS))
        end.send_tensor(torch.zeros(2), role="ir", run="0" * 32, epoch=0, step=0)
        answers.append(end.receive(m.ANSWERS))
        end.send(m.Done())

    stage.play(play)
    stage.enclave.request(ASKED)
    assert [type(answer) for answer in answers] == [m.CallFailed] * 4
    codes = [answer.error["code"] for answer in answers]
    assert codes == ["storage.missing", "storage.name", "door.unexpected", "door.unexpected"]
    assert tree(stage.enclave.store.root) == {}


class Doubling:
    """A CenterNet that sends back twice what it gets."""

    def take(self, head: TensorHead, tensor: torch.Tensor, channel: Channel) -> None:
        """Answer one tensor."""
        channel.send_tensor(tensor * 2, role="ir-grad", run=head.run, epoch=head.epoch, step=head.step)

    def commitment(self) -> bytes:
        """A digest of nothing."""
        return b"c" * 32


def test_tensors_go_to_the_center(stage: Stage) -> None:
    answers: list[Any] = []

    def play(end: Channel) -> None:
        where: dict[str, Any] = {"run": "0" * 32, "epoch": 1, "step": 2}
        end.send_tensor(torch.ones(3), role="ir", **where)
        answers.append(end.receive_tensor(role="ir-grad", or_message=m.ANSWERS, **where))
        end.send(m.CommitCenter(1))
        answers.append(end.receive(m.ANSWERS))
        end.send(m.Done())

    stage.enclave.center = Doubling()
    stage.play(play)
    stage.enclave.request(ASKED)
    assert answers[0].tolist() == [2, 2, 2]
    assert answers[1] == m.Data(b"c" * 32)


def test_an_error_of_the_enclave_is_raised_as_it_was_there(stage: Stage) -> None:
    error = IntegrityError("sealed.not-authentic", "no", step="ingest", fix="Send it again.")
    stage.play(lambda end: end.send(m.Failed(error.diagnostics(), fatal=True)))
    with refused(IntegrityError, "sealed.not-authentic"):
        stage.enclave.request(ASKED)


def test_an_answer_that_is_not_due_is_refused(stage: Stage) -> None:
    stage.play(lambda end: end.send(READY))
    with refused(ProtocolError, "door.unexpected"):
        stage.enclave.request(ASKED)


def test_an_enclave_that_dies_in_a_conversation_is_named_with_its_status(stage: Stage) -> None:
    def die(end: Channel) -> None:
        stage.process.kill()
        end.close()

    stage.play(die)
    with refused(EnvironmentFault, "enclave.died") as caught:
        stage.enclave.request(ASKED)
    assert "exit status -9" in caught.value.what
    with refused(EnvironmentFault, "enclave.died"):
        stage.enclave.request(ASKED)
    with refused(EnvironmentFault, "enclave.died"):
        stage.enclave.check_alive()


def test_an_enclave_that_lives_passes_the_check(stage: Stage) -> None:
    stage.enclave.check_alive()


def test_a_program_that_closed_its_end_but_goes_on_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_STOP_SECONDS", 0.1)
    stage.play(lambda end: end.close())
    with refused(EnvironmentFault, "enclave.died"):
        stage.enclave.request(ASKED)
    assert stage.process.poll() == -9


def test_while_the_enclave_is_at_work_others_are_told_to_come_back(stage: Stage) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def play(end: Channel) -> None:
        asked.set()
        assert go_on.wait(SECONDS)
        end.send(m.Done())

    stage.play(play)
    first = threading.Thread(target=stage.enclave.request, args=(ASKED,))
    first.start()
    assert asked.wait(SECONDS)
    with refused(EnvironmentFault, "enclave.busy"):
        stage.enclave.request(m.Attest("query", "0" * 64), wait=0.01)
    go_on.set()
    first.join(SECONDS)
    assert not first.is_alive()


def test_an_error_of_ours_in_a_conversation_is_not_taken_for_the_enclaves_end(stage: Stage) -> None:
    def full(_: object) -> None:
        raise EnvironmentFault("storage.full", "full", step="store", fix="Free space.")

    stage.enclave.on_events = full
    stage.play(lambda end: end.send(m.Done()))
    with refused(EnvironmentFault, "storage.full"):
        stage.enclave.request(ASKED)
    stage.enclave.check_alive()


def test_an_enclave_that_listens_is_asked_to_stop(stage: Stage) -> None:
    heard: list[Any] = []

    def listen() -> None:
        heard.append(stage.other.receive(m.REQUESTS))
        stage.process.terminate()

    listener = threading.Thread(target=listen)
    listener.start()
    stage.enclave.stop()
    listener.join(SECONDS)
    assert heard == [m.Stop()]
    assert stage.process.poll() == -15
    stage.enclave.stop()  # again: nothing happens


def test_an_enclave_at_work_is_ended_at_once(stage: Stage) -> None:
    asked = threading.Event()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            stage.enclave.request(ASKED)
        except EnvironmentFault as error:
            errors.append(error)

    stage.play(lambda _: asked.set())
    asking = threading.Thread(target=ask)
    asking.start()
    assert asked.wait(SECONDS)
    began = time.monotonic()
    stage.enclave.stop()
    assert time.monotonic() - began < 5
    assert stage.process.poll() == -9
    stage.other.close()  # as the kernel does for a program that is gone
    asking.join(SECONDS)
    assert [getattr(error, "code", "") for error in errors] == ["enclave.died"]


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Enclave:
    """Launch another program in the enclave's place; `sock` is its end of the door."""
    script = tmp_path / "program"
    script.write_text(f"#!{sys.executable} -IS\nimport os, sys\nsock = int(sys.argv[4])\n{program}\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(launcher, "find_bubblewrap", lambda: Confinement(None, "not in this test"))
    with (tmp_path / "log").open("wb") as log:
        return launch(
            Store(tmp_path / "host"),
            slot_bytes=4096,
            threads=1,
            root_secret=bytes(32),
            on_progress=lambda _: None,
            on_events=lambda _: None,
            log=log.fileno(),
        )


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


SAYS = "os.read(sock, 65536); os.write(sock, {!r})"
DONE = b"\x81\xa1t\xa4done"  # {"t": "done"} in MessagePack


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("sys.stderr.write('why'); sys.exit(3)", "exit status 3"),
        ("os.read(sock, 65536); os.kill(os.getpid(), 9)", "exit status -9"),
        (SAYS.format(b"\x04\0\0\0\x01{}!"), "not what may come through the door"),
        (SAYS.format(b"\xff\xff\xff\xff\x01"), "claims 4294967295 bytes"),
        (SAYS.format(b"\x09\0\0\0\x01" + DONE), "first words are not Ready"),
    ],
)
def test_a_program_that_does_not_start_as_it_should_is_named_and_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    before = open_descriptors()
    with refused(EnvironmentFault, "enclave.did-not-start") as caught:
        started(tmp_path, monkeypatch, program)
    assert said in caught.value.what
    assert (tmp_path / "log").read_text() == ("why" if "why" in program else "")
    assert open_descriptors() <= before + 1  # the ring's memory lives as long as somebody may look at the error
