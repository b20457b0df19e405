"""The queue of a served model: who is computed together, who is told to come back, who is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from caltrain.errors import AccessError, CaltrainError, DataError, EnvironmentFault
from caltrain.host.serving import batcher as module
from caltrain.host.serving.batcher import Batcher
from caltrain.host.serving.faults import Outcome, bad_rows
from support.samples import refused

DENIED = AccessError("user.budget-spent", "no", step="admit", fix="Stop.")


class Runner:
    """Computes a batch once the test says so. A frame's length is its number of records."""

    slots, most_rows = 2, 4

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.gates: list[asyncio.Event] = []
        self.fails: Exception | None = None
        self.refuse: bytes | None = None

    def rows_of(self, frame: bytes) -> int:
        """Its length."""
        if not 1 <= len(frame) <= self.most_rows:
            raise bad_rows(f"{len(frame)} records")
        return len(frame)

    async def run(self, batch: list[bytes]) -> list[Outcome]:
        """Upper case, once the gate is open."""
        self.batches.append(batch)
        self.gates.append(asyncio.Event())
        await self.gates[-1].wait()
        if self.fails:
            raise self.fails
        return [DENIED if frame == self.refuse else frame.upper() for frame in batch]

    def open(self) -> None:
        """Let everything that is under way end."""
        for gate in self.gates:
            gate.set()


def played(play: Callable[[Runner, Batcher], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a test in a loop of its own."""

    async def body() -> None:
        runner = Runner()
        async with asyncio.timeout(20):
            await play(runner, Batcher(runner, **options))

    asyncio.run(body())


async def settled() -> None:
    """Let all that is due now happen."""
    for _ in range(10):
        await asyncio.sleep(0)


def begin(batcher: Batcher, *frames: bytes, **how: Any) -> list[asyncio.Task[bytes]]:
    """Requests that arrive together."""
    return [asyncio.get_running_loop().create_task(batcher.submit(frame, **how)) for frame in frames]


def test_requests_that_arrive_together_are_computed_together_and_each_gets_its_own_answer() -> None:
    rows: list[int] = []

    async def play(runner: Runner, batcher: Batcher) -> None:
        runner.refuse = b"bb"
        tasks = begin(batcher, b"a", b"bb", b"c")
        await settled()
        assert runner.batches == [[b"a", b"bb", b"c"]]
        runner.open()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes == [b"A", DENIED, b"C"]
        await settled()
        assert batcher.idle
        assert batcher.rows == 0

    played(play, on_batch=rows.append)
    assert rows == [4]


def test_only_two_batches_are_under_way_and_the_next_takes_what_waits_up_to_its_limit() -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        tasks = begin(batcher, b"a")
        await settled()
        tasks += begin(batcher, b"b")
        await settled()
        tasks += begin(batcher, b"c", b"dd", b"ee", b"f")
        await settled()
        assert runner.batches == [[b"a"], [b"b"]]
        assert batcher.rows == 6
        runner.gates[0].set()
        await settled()
        assert runner.batches[2:] == [[b"c", b"dd"]], "the next one would be too many"
        runner.open()
        await settled()
        assert runner.batches[3:] == [[b"ee", b"f"]]
        runner.open()
        assert await asyncio.gather(*tasks) == [b"A", b"B", b"C", b"DD", b"EE", b"F"]

    played(play)


def test_a_batch_has_at_most_so_many_bytes_but_always_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 2)

    async def play(runner: Runner, batcher: Batcher) -> None:
        tasks = begin(batcher, b"aaa", b"b", b"c", b"d")
        await settled()
        assert runner.batches == [[b"aaa"], [b"b", b"c"]]
        runner.open()
        await settled()
        runner.open()
        await asyncio.gather(*tasks)

    played(play)


def test_with_a_delay_a_request_waits_for_company_but_no_longer_and_not_once_there_is_enough() -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        tasks = begin(batcher, b"a")
        await asyncio.sleep(0.02)
        assert runner.batches == []
        tasks += begin(batcher, b"b")
        await asyncio.sleep(0.25)
        await settled()
        assert runner.batches == [[b"a", b"b"]]
        tasks += begin(batcher, b"cc", b"dd")
        await settled()
        assert runner.batches[1:] == [[b"cc", b"dd"]]
        runner.open()
        await asyncio.gather(*tasks)

    played(play, delay_ms=200)


def test_a_request_of_a_wrong_size_is_refused_and_nothing_is_computed() -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        for frame in (b"", b"aaaaa"):
            with refused(DataError, "request.rows"):
                await batcher.submit(frame)
        await settled()
        assert runner.batches == []
        assert batcher.idle

    played(play)


def test_more_than_eight_batches_of_records_are_told_to_come_back() -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        tasks = begin(batcher, *[b"aaaa"] * 2)
        await settled()
        tasks += begin(batcher, *[b"aaaa"] * 8)
        await settled()
        with refused(EnvironmentFault, "serving.busy"):
            await batcher.submit(b"a")
        while not all(task.done() for task in tasks):
            runner.open()
            await settled()
        assert len(runner.batches) == 10
        (task,) = begin(batcher, b"a")
        await settled()
        runner.open()
        assert await task == b"A"

    played(play)


def test_who_has_gone_before_the_batch_begins_is_not_computed() -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        asked: list[bool] = []

        async def gone() -> bool:
            asked.append(True)
            return True

        tasks = begin(batcher, b"a")
        await settled()
        tasks += begin(batcher, b"b")
        await settled()
        cancelled, kept = begin(batcher, b"c", b"d")
        (left,) = begin(batcher, b"e", gone=gone)
        await asyncio.sleep(0.15)
        cancelled.cancel()
        await settled()
        assert batcher.rows == 2
        runner.open()
        await settled()
        assert runner.batches[2:] == [[b"d"]]
        assert asked
        runner.open()
        assert await asyncio.gather(*tasks, kept) == [b"A", b"B", b"D"]
        with pytest.raises(asyncio.CancelledError):
            await left

    played(play)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (EnvironmentFault("serving.restarted", "gone", step="infer", fix="Again."), "serving.restarted"),
        (RuntimeError("secret"), "serving.failed"),
    ],
)
def test_a_runner_that_fails_fails_its_batch_and_the_next_is_computed(raised: Exception, code: str) -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        runner.fails = raised
        tasks = begin(batcher, b"a", b"b")
        await settled()
        runner.open()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, CaltrainError)
            assert outcome.code == code
            assert "secret" not in str(outcome)
        runner.fails = None
        (task,) = begin(batcher, b"c")
        await settled()
        runner.open()
        assert await task == b"C"

    played(play)


def test_what_waits_can_be_failed_at_once_and_what_is_under_way_goes_on() -> None:
    async def play(runner: Runner, batcher: Batcher) -> None:
        under_way = begin(batcher, b"aaaa", b"bbbb")
        await settled()
        waiting = begin(batcher, b"cccc", b"dddd")
        await settled()
        batcher.fail(DENIED)
        assert await asyncio.gather(*waiting, return_exceptions=True) == [DENIED] * 2
        runner.open()
        assert await asyncio.gather(*under_way) == [b"AAAA", b"BBBB"]
        assert batcher.rows == 0

    played(play)
