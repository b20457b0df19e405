"""The demo's processes: their results, their errors, and that none of them is left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caltrain.demo import processes
from caltrain.demo.processes import Background, Crew, command, crew, undisturbed
from caltrain.errors import DataError, EnvironmentFault
from support.processes import alive, wait_until

# What the crew's "commands" are here: Python programs given as text.
HELLO = "print('{\"hello\": 1}')"
FAILS = (
    "import json; print(json.dumps({'error': {'family': 'DataError', 'code': 'seal.count', "
    "'what': 'none', 'step': 'seal', 'fix': 'give some'}})); raise SystemExit(11)"
)
SLEEPS = "import time; print('{\"started\": 1}', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('{\"started\": 1}', flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "command", lambda *words: [sys.executable, "-c", *(str(word) for word in words)])


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Crew]:
    with crew(tmp_path / "logs") as found:
        yield found


def pid(member: Background) -> int:
    return member._process.pid


def test_a_command_line_is_this_pythons_caltrain_with_json() -> None:
    assert command("party", Path("a b")) == [sys.executable, "-m", "caltrain", "party", "a b", "--format", "json"]


def test_the_result_is_the_last_line_and_the_log_is_kept(members: Crew, tmp_path: Path) -> None:
    assert members.start("one", "print('noise')\n" + HELLO).result() == {"hello": 1}
    assert (tmp_path / "logs" / "one.log").read_text(encoding="utf-8") == 'noise\n{"hello": 1}\n'


def test_a_result_with_an_empty_field_for_errors_is_a_result(members: Crew) -> None:
    assert members.start("status", "print('{\"error\": null}')").result() == {"error": None}


def test_commands_run_side_by_side(members: Crew, tmp_path: Path) -> None:
    # Each waits for the other's file: one after the other, they would wait forever.
    def program(own: str, other: str) -> str:
        return (
            f"import pathlib, time; pathlib.Path({str(tmp_path / own)!r}).touch()\n"
            f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.01)\n"
            f'print(\'{{"own": "{own}"}}\')'
        )

    found = members.run_all({"a": (program("a", "b"),), "b": (program("b", "a"),)})
    assert found == {"a": {"own": "a"}, "b": {"own": "b"}}


def test_a_failing_command_raises_its_own_error(members: Crew) -> None:
    with pytest.raises(DataError, match=r"^seal\.count: none"):
        members.run_all({"good": (HELLO,), "bad": (FAILS,)})
    bad = members.start("bad", FAILS)
    with pytest.raises(DataError):
        bad.first_line()
    wait_until(lambda: bad.failed)


@pytest.mark.parametrize("program", ["raise SystemExit('no memory')", "print('[1]')", "print('no json')", "pass"])
def test_a_command_that_dies_without_a_word_is_a_named_error(program: str, members: Crew) -> None:
    for read in (Background.result, Background.first_line):
        with pytest.raises(EnvironmentFault, match=r"^demo\.process-failed: ") as caught:
            read(members.start("dies", program))
        assert "dies.log" in caught.value.what
        if "no memory" in program:
            assert "no memory" in caught.value.what


def test_the_first_line_is_awaited_no_longer_than_asked(members: Crew) -> None:
    silent = members.start("silent", "import time; time.sleep(600)")
    with pytest.raises(EnvironmentFault, match=r"^demo\.process-failed: "):
        silent.first_line(seconds=0.1)
    assert not silent.failed


@pytest.mark.parametrize("program", [SLEEPS, STUBBORN])
def test_nothing_is_left_when_the_block_ends(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 1)
    with crew(tmp_path) as found:
        started = [found.start(str(i), program) for i in range(3)]
        for member in started:
            member.first_line()
        assert all(alive(pid(member)) for member in started)
    assert not any(alive(pid(member)) for member in started)


def test_nothing_is_left_when_the_block_fails(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail() -> None:
        with crew(tmp_path) as found:
            pids.append(pid(found.start("sleeps", SLEEPS)))
            found.run_all({"bad": (FAILS,)})

    with pytest.raises(DataError):
        fail()
    assert len(pids) == 1
    assert not alive(pids[0])


def test_all_are_told_to_end_before_any_is_waited_for(tmp_path: Path) -> None:
    slow = (
        "import signal, time\n"
        "def end(*_):\n    time.sleep(1); raise SystemExit\n"
        "signal.signal(signal.SIGTERM, end); print('{\"started\": 1}', flush=True); time.sleep(600)"
    )
    with crew(tmp_path) as found:
        for member in [found.start(str(i), slow) for i in range(4)]:
            member.first_line()
        began = time.monotonic()
    assert time.monotonic() - began < 3.5


def test_ctrl_c_does_not_reach_the_commands_themselves(members: Crew) -> None:
    member = members.start("sleeps", SLEEPS)
    member.first_line()
    assert os.getsid(pid(member)) == pid(member) != os.getsid(0)


INTERRUPTS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", INTERRUPTS)
def test_an_interrupt_waits_until_the_block_ends(number: signal.Signals) -> None:
    heard: list[int] = []
    former = signal.signal(number, lambda n, _: heard.append(n))
    try:
        with undisturbed():
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert heard == []
        assert heard == [number]
        signal.raise_signal(number)
        assert heard == [number, number]
    finally:
        signal.signal(number, former)


def test_without_an_interrupt_nothing_is_raised_and_handlers_are_as_before() -> None:
    before = [signal.getsignal(number) for number in INTERRUPTS]
    with undisturbed():
        assert all(signal.getsignal(number) not in before for number in INTERRUPTS)
    assert [signal.getsignal(number) for number in INTERRUPTS] == before


def test_an_interrupt_while_a_process_is_started_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start: Callable[..., None] = Background.__init__
    pids: list[int] = []

    def interrupted(self: Background, argv: list[str], *, log: Path) -> None:
        start(self, argv, log=log)
        pids.append(pid(self))
        signal.raise_signal(signal.SIGINT)  # before the crew has it on record

    monkeypatch.setattr(Background, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt), crew(tmp_path) as found:
        found.start("sleeps", SLEEPS)
    assert len(pids) == 1
    assert not alive(pids[0])


def test_a_second_ctrl_c_does_not_stop_the_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end: Callable[..., None] = Background.terminate

    def interrupted(self: Background) -> None:
        signal.raise_signal(signal.SIGINT)
        end(self)

    monkeypatch.setattr(Background, "terminate", interrupted)
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt), crew(tmp_path) as found:
        pids += [pid(found.start(str(i), SLEEPS)) for i in range(3)]
    assert not any(alive(number) for number in pids)


def test_what_a_command_says_of_its_error_is_untrusted(members: Crew) -> None:
    words = {"error": {"family": "Nonsense", "code": 7, "what": ["x"]}}
    with pytest.raises(Exception, match="without a readable error"):
        members.start("odd", f"print({json.dumps(json.dumps(words))})").result()
