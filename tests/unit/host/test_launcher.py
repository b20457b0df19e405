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
from caltrain.boundary.channel import Channel, Tensors
from caltrain.boundary.tensors import TensorHead
from caltrain.crypto.dsse import Envelope
from caltrain.errors import EnvironmentFault, IntegrityError, ProtocolError
from caltrain.host import launcher
from caltrain.host.confine import Confinement
from caltrain.host.launcher import Enclave, launch
from caltrain.host.store import Store
from support.disk import files_end_at, tree
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
        for call in (m.Read("center", 0, 9), m.Write("a/../../b", 0, b"x"), m.CommitCenter(0, 0), m.ShowCenter(0, 0)):
            end.send(call)
            answers.append(end.receive(m.ANSWERS))
        end.send_tensors([torch.zeros(2)], role="ir", run="0" * 32, epoch=0, step=0)
        answers.append(end.receive(m.ANSWERS))
        end.send(m.Done())

    stage.play(play)
    stage.enclave.request(ASKED)
    assert [type(answer) for answer in answers] == [m.CallFailed] * 5
    codes = [answer.error["code"] for answer in answers]
    assert codes == ["storage.missing", "storage.name", *["door.unexpected"] * 3]
    assert tree(stage.enclave.store.root) == {}


class Doubling:
    """A CenterNet that sends back twice what it gets, and keeps no state but that before step 1.2."""

    def take(self, head: TensorHead, tensors: Tensors, channel: Channel) -> None:
        """Answer tensors."""
        doubled = [x * 2 for x in tensors]
        channel.send_tensors(doubled, role="ir-grad", run=head.run, epoch=head.epoch, step=head.step)

    def commit(self, epoch: int, step: int) -> bytes:
        """A digest of nothing."""
        return bytes([epoch, step]) * 16

    def committed(self, epoch: int, step: int) -> bytes:
        """A state of nothing."""
        if (epoch, step) != (1, 2):
            raise EnvironmentFault("center.not-kept", "not kept", step="show center", fix="Ask for another.")
        return b"state"


def test_tensors_go_to_the_center(stage: Stage) -> None:
    answers: list[Any] = []

    def play(end: Channel) -> None:
        where: dict[str, Any] = {"run": "0" * 32, "epoch": 1, "step": 2}
        end.send_tensors([torch.ones(3), torch.ones(1)], role="ir", **where)
        answers.append(end.receive_tensors(role="ir-grad", or_message=m.ANSWERS, **where))
        end.send(m.CommitCenter(1, 2))
        answers.append(end.receive(m.ANSWERS))
        end.send(m.Done())

    stage.enclave.center = Doubling()
    stage.play(play)
    stage.enclave.request(ASKED)
    assert [x.tolist() for x in answers[0]] == [[2, 2, 2], [2]]
    assert answers[1] == m.Data(b"\1\2" * 16)
    assert tree(stage.enclave.store.root) == {}, "a commitment alone keeps nothing on the disk"


def test_a_durable_commitment_is_kept_and_a_committed_state_is_shown(stage: Stage) -> None:
    answers: list[Any] = []

    def play(end: Channel) -> None:
        for call in (m.CommitCenter(1, 2, durable=True), m.ShowCenter(1, 2), m.Read("center-state", 0, 9)):
            end.send(call)
            answers.append(end.receive(m.ANSWERS))
        end.send(m.Done())

    stage.enclave.center = Doubling()
    stage.play(play)
    stage.enclave.request(ASKED)
    assert answers == [m.Data(b"\1\2" * 16), m.Data((5).to_bytes(8, "big")), m.Data(b"state")]
    assert tree(stage.enclave.store.root) == {"center-at-1-2": b"state", "center-state": b"state"}


@pytest.mark.parametrize("call", [m.ShowCenter(1, 1), m.CommitCenter(1, 1, durable=True)])
def test_a_state_that_is_not_kept_is_answered_with_its_error(stage: Stage, call: m.ShowCenter | m.CommitCenter) -> None:
    answers: list[Any] = []

    def play(end: Channel) -> None:
        end.send(call)
        answers.append(end.receive(m.ANSWERS))
        end.send(m.Done())

    stage.enclave.center = Doubling()
    stage.play(play)
    stage.enclave.request(ASKED)
    assert [answer.error["code"] for answer in answers] == ["center.not-kept"]
    assert tree(stage.enclave.store.root) == {}


# -- the storage stream -------------------------------------------------------------------------------------------


class Storage:
    """The storage thread, and the enclave's end of its stream."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.settimeout(SECONDS)
        self.store, self.end, self.sock = Store(folder), Channel(theirs), ours
        self.thread = threading.Thread(target=launcher._serve_until_closed, args=(self.store, Channel(ours)))
        self.thread.start()

    def ask(self, call: m.Message) -> Any:
        """Its answer to a call."""
        self.end.send(call)
        return self.end.receive(m.ANSWERS)

    def over(self) -> None:
        """The thread has ended, and its end of the stream is closed."""
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        assert self.sock.fileno() == -1


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """A storage thread, ended afterwards."""
    made = Storage(tmp_path / "host")
    yield made
    made.end.close()
    made.over()


def test_storage_is_served_on_a_stream_of_its_own_until_the_enclave_ends(storage: Storage) -> None:
    assert storage.ask(m.Write("pool-0", 1, b"bc")) == m.Data()
    assert storage.ask(m.Read("pool-0", 0, 9)) == m.Data(b"\0bc")
    storage.end.close()
    storage.over()
    assert tree(storage.store.root) == {"pool-0": b"\0bc"}


def test_a_failed_storage_call_is_answered_and_the_stream_goes_on(storage: Storage) -> None:
    failed = [storage.ask(m.Read("center", 0, 9)), storage.ask(m.Write("a/../../b", 0, b"x"))]
    assert [answer.error["code"] for answer in failed] == ["storage.missing", "storage.name"]
    assert storage.ask(m.Write("a", 0, b"x")) == m.Data()
    with files_end_at(4):
        assert storage.ask(m.Write("a", 0, b"longer than that")).error["code"] == "storage.full"
    assert storage.ask(m.Read("a", 0, 1)) == m.Data(b"l")


@pytest.mark.parametrize(
    "call", [m.CommitCenter(0, 0), m.ShowCenter(0, 0), m.Progress("train", 1, 2), m.Done(), m.Stop()]
)
def test_what_is_no_storage_call_closes_the_stream_and_stores_nothing(storage: Storage, call: m.Message) -> None:
    storage.end.send(call)
    with refused(EnvironmentFault, "door.closed"):
        storage.end.receive(m.ANSWERS)
    storage.over()
    assert tree(storage.store.root) == {}


def test_tensors_have_no_place_on_the_storage_stream(storage: Storage) -> None:
    storage.end.send_tensors([torch.zeros(2)], role="ir", run="0" * 32, epoch=0, step=0)
    with refused(EnvironmentFault, "door.closed"):
        storage.end.receive(m.ANSWERS)
    storage.over()


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
    assert "with --resume" in caught.value.fix
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


def goes_on(thread: threading.Thread) -> bool:
    """Whether a thread goes on all the same."""
    thread.join(SECONDS)
    return thread.is_alive()


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
    assert not [thread for thread in threading.enumerate() if thread.name == "storage" and goes_on(thread)]
    assert open_descriptors() <= before + 1  # the ring's memory lives as long as somebody may look at the error
