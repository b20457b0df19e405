"""Asking a served model: answers are for their requests or refused; a busy host is waited for, never without end."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from caltrain.client.served import exchange
from caltrain.client.served.session import UNDER_WAY
from caltrain.errors import AccessError, CaltrainError, DataError, EnvironmentFault, IntegrityError, ProtocolError
from caltrain.serving.oip import pack_sealed_reply
from caltrain.serving.session import Answer, read_head
from support.samples import refused
from support.scripted_served import ScriptedServed, busy, package, probabilities_of
from support.tiny import CLASSES, pictures

ROWS = pictures(3, seed=7)


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits in these tests; how long they would have."""
    naps: list[float] = []

    async def sleep(seconds: float) -> None:
        naps.append(seconds)

    monkeypatch.setattr("time.sleep", naps.append)
    monkeypatch.setattr("caltrain.client.served.aio.asyncio.sleep", sleep)
    return naps


@pytest.mark.parametrize("dtype", ["u8", "f32"])
@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_answers_are_those_of_the_records_in_their_order(dtype: Any, count: int) -> None:
    host = ScriptedServed(package(dtype=dtype))
    records = pictures(count, seed=3, dtype=dtype)
    with host.connect() as served:
        got = served.predict(records)
    assert np.array_equal(got.probabilities, probabilities_of(records))
    assert got.probabilities.dtype == np.float32
    assert got.classes == [CLASSES[i] for i in probabilities_of(records).argmax(1)]
    assert got.indices.tolist() == probabilities_of(records).argmax(1).tolist()
    assert (got.names, got.audited, got.budget_left) == (CLASSES, False, 100 - count)
    assert (got.package, got.model) == (host.package.digest(), host.package.model)
    assert len(host.frames) == -(-count // 4)


def test_the_async_client_answers_the_same() -> None:
    host = ScriptedServed()
    records = [pictures(5, seed=seed) for seed in range(20)]

    async def ask() -> list[NDArray[np.float32]]:
        async with await host.connect_async() as served:
            assert (served.names, served.budget_left, served.package) == (CLASSES, 100, host.package)
            assert served.claims.simulated
            assert await served.ready()
            return [got.probabilities for got in await asyncio.gather(*map(served.predict, records))]

    assert all(map(np.array_equal, asyncio.run(ask()), map(probabilities_of, records)))


def test_records_of_any_layout_in_memory_are_the_same() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        assert np.array_equal(
            served.predict(ROWS[:, :, ::-1, ::-1]).probabilities, probabilities_of(ROWS[:, :, ::-1, ::-1].copy())
        )


def test_all_batches_must_be_audited_for_an_audited_answer() -> None:
    host = ScriptedServed()
    seen: list[int] = []

    def audit(answer: Answer) -> Answer:
        seen.append(1)
        return msgspec.structs.replace(answer, audited=len(seen) != 2)

    host.answer = audit
    with host.connect() as served:
        assert served.predict(ROWS).audited
        assert not served.predict(pictures(9, seed=1)).audited
        assert served.predict(ROWS).audited


@pytest.mark.parametrize(
    ("code", "dtype", "records"),
    [
        ("ask.shape", "u8", ROWS[0]),
        ("ask.shape", "u8", ROWS[:0]),
        ("ask.shape", "u8", ROWS[:, :, :3]),
        ("ask.shape", "u8", ROWS.astype(np.float32)),
        ("ask.shape", "u8", ROWS.astype(np.int8)),
        ("ask.shape", "u8", np.zeros((), np.uint8)),
        ("ask.shape", "f32", ROWS),
        ("ask.shape", "f32", ROWS.astype(np.float64)),
        ("ask.shape", "f32", ROWS.astype(">f4")),
        ("ask.not-finite", "f32", np.full(ROWS.shape, np.nan, np.float32)),
        ("ask.not-finite", "f32", np.full(ROWS.shape, np.inf, np.float32)),
    ],
)
def test_what_the_model_does_not_take_is_not_sealed(code: str, dtype: Any, records: NDArray[np.generic]) -> None:
    host = ScriptedServed(package(dtype=dtype))
    with host.connect() as served, refused(DataError, code):
        served.predict(records)
    assert host.frames == []


def test_an_answer_to_another_request_is_refused() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        served.predict(ROWS)
        host.edit["infer"] = lambda _: pack_sealed_reply("tiny", "1", "", host.answers[0])[0]
        with refused(ProtocolError, "answer.foreign"):
            served.predict(ROWS)


def test_an_answer_put_under_another_number_is_refused() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        served.predict(ROWS)
        head = struct.Struct(">BBQ")

        def renumber(_: bytes) -> bytes:
            mine = host.answers[-1]
            return pack_sealed_reply("tiny", "1", "", mine[: head.size] + host.answers[0][head.size :])[0]

        host.edit["infer"] = renumber
        with refused(IntegrityError, "sealed.not-authentic"):
            served.predict(ROWS)


def test_an_answer_of_another_session_is_refused() -> None:
    host = ScriptedServed()
    with host.connect() as served, host.connect() as other:
        served.predict(ROWS)
        host.edit["infer"] = lambda _: pack_sealed_reply("tiny", "1", "", host.answers[0])[0]
        with refused(IntegrityError, "sealed.not-authentic"):
            other.predict(ROWS)


@pytest.mark.parametrize(
    ("family", "code", "cut"),
    [
        (ProtocolError, "answer.foreign", lambda sealed: b"\1"),
        (ProtocolError, "answer.foreign", lambda sealed: sealed[:34]),
        (IntegrityError, "sealed.not-authentic", lambda sealed: sealed[:-1]),
        (IntegrityError, "sealed.not-authentic", lambda sealed: sealed + b"\0"),
        (IntegrityError, "sealed.not-authentic", lambda sealed: sealed[:-1] + bytes([sealed[-1] ^ 1])),
    ],
)
def test_an_answer_that_was_changed_is_refused(family: type[CaltrainError], code: str, cut: Any) -> None:
    host = ScriptedServed()
    host.edit["infer"] = lambda _: pack_sealed_reply("tiny", "1", "", cut(host.answers[-1]))[0]
    with host.connect() as served, refused(family, code):
        served.predict(ROWS)


@pytest.fixture(autouse=True)
def same_length_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edited replies have the header of their own JSON."""
    handle = ScriptedServed.handle

    def fixed(self: ScriptedServed, request: httpx.Request) -> httpx.Response:
        answer = handle(self, request)
        if "infer" in self.edit and b"}]}" in answer.content:
            answer.headers["Inference-Header-Content-Length"] = str(answer.content.index(b"}]}") + 3)
        return answer

    monkeypatch.setattr(ScriptedServed, "handle", fixed)


@pytest.mark.parametrize("reply", [b"", b"{}", b"not json", b'{"outputs":[]}', b"[" * 9999])
def test_a_reply_that_holds_no_answer_is_refused(reply: bytes) -> None:
    host = ScriptedServed()
    host.edit["infer"] = lambda _: httpx.Response(200, content=reply)
    with host.connect() as served, refused(DataError, "oip.malformed"):
        served.predict(ROWS)


def test_a_reply_without_end_is_refused() -> None:
    host = ScriptedServed()
    host.edit["infer"] = lambda _: bytes(20_000)
    with host.connect() as served, refused(ProtocolError, "host.garbage"):
        served.predict(ROWS)


def numbers(*rows: list[float]) -> bytes:
    """Probabilities as an enclave sends them."""
    return np.array(rows, "<f4").tobytes()


@pytest.mark.parametrize(
    ("code", "top", "probabilities"),
    [
        ("answer.size", None, b""),
        ("answer.size", None, numbers([1, 0])),
        ("answer.size", None, numbers([1, 0, 0], [1, 0, 0])),
        ("answer.not-probabilities", None, numbers([float("nan"), 0.5, 0.5])),
        ("answer.not-probabilities", None, numbers([float("inf"), 0, 0])),
        ("answer.not-probabilities", None, numbers([1.5, -0.5, 0])),
        ("answer.not-probabilities", None, numbers([0.5, 0.498, 0])),
        ("answer.not-probabilities", None, numbers([0.5, 0.502, 0])),
        ("answer.not-probabilities", 1, numbers([0, 1.002, 0])),
        ("answer.not-probabilities", 1, numbers([float("nan"), 0.5, 0])),
        ("answer.not-probabilities", 1, numbers([-0.5, 0.5, 0])),
        ("", None, numbers([0.5, 0.4995, 0])),
        ("", None, numbers([0.5, 0.5005, 0])),
        ("", 1, numbers([0, 0.4, 0])),
    ],
)
def test_numbers_that_are_no_probabilities_are_refused(code: str, top: int | None, probabilities: bytes) -> None:
    host = ScriptedServed(package(top=top))
    host.answer = lambda answer: msgspec.structs.replace(answer, probabilities=probabilities)
    with host.connect() as served:
        if code:
            with refused(ProtocolError, code):
                served.predict(ROWS[:1])
        else:
            assert served.predict(ROWS[:1]).probabilities.astype("<f4").tobytes() == probabilities


def test_a_refused_answer_gives_its_lane_back_and_leaves_the_budget_as_it_was_known() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        host.answer = lambda answer: msgspec.structs.replace(answer, probabilities=b"", budget_left=7)
        with refused(ProtocolError, "answer.size"):
            served.predict(ROWS)
        assert served.budget_left == 100
        host.answer = lambda answer: answer
        for _ in range(UNDER_WAY // 16):
            served.predict(ROWS[:1])
        assert len(served._session._free) == UNDER_WAY


@pytest.mark.parametrize("code", ["serving.busy", "serving.no-key", "serving.draining", "serving.too-slow"])
def test_a_busy_host_is_asked_again_in_a_new_frame(code: str, slept: list[float]) -> None:
    host = ScriptedServed()
    host.instead.extend([busy(code, after="2"), busy(code, after="3")])
    with host.connect() as served:
        got = served.predict(ROWS)
    assert np.array_equal(got.probabilities, probabilities_of(ROWS))
    assert slept == [2, 3]
    heads = [(read_head(frame).lane, read_head(frame).number) for frame in host.frames]
    assert len(set(heads)) == len(set(host.frames)) == 3


def test_no_number_of_a_lane_is_used_twice() -> None:
    host = ScriptedServed(package(budget=2000))
    with host.connect() as served:
        for _ in range(2 * UNDER_WAY + 3):
            served.predict(ROWS[:1])
    used = Counter((head.lane, head.number) for head in map(read_head, host.frames))
    assert max(used.values()) == 1
    assert {number for _, number in used} == {0, 1, 2}
    assert {lane for lane, _ in used} == set(range(UNDER_WAY))


def test_a_forked_process_seals_nothing_under_the_numbers_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ScriptedServed()
    with host.connect() as served:
        with monkeypatch.context() as forked:
            forked.setattr("os.getpid", lambda: -1)
            with refused(ProtocolError, "session.other-process"):
                served.predict(ROWS)
        assert not host.frames
        served.predict(ROWS)


@pytest.mark.parametrize("after", [None, "0", "1"])
def test_too_many_requests_of_a_session_are_waited_for(after: str | None, slept: list[float]) -> None:
    host = ScriptedServed()
    host.instead.append(busy("session.busy", after=after, status=429))
    with host.connect() as served:
        served.predict(ROWS)
    assert slept == [1.0 if after == "1" else 0.05]


def test_when_all_lanes_are_taken_the_next_one_waits(slept: list[float]) -> None:
    host = ScriptedServed()
    with host.connect() as served:
        lanes = [served._session.acquire() for _ in range(UNDER_WAY)]
        with refused(AccessError, "session.busy"):
            served.predict(ROWS, patience=0.2)
        assert sum(slept) <= 0.2
        assert host.frames == []
        served._session.release(lanes[9])
        served.predict(ROWS)
    assert read_head(host.frames[0]).lane == lanes[9]


def test_a_host_that_never_has_time_is_given_up_after_the_patience(slept: list[float]) -> None:
    host = ScriptedServed()
    with host.connect() as served:
        host.instead.extend(busy(after="4") for _ in range(50))
        with refused(EnvironmentFault, "serving.busy"):
            served.predict(ROWS, patience=10)
        assert slept == [4, 4]
        del slept[:]
        with refused(EnvironmentFault, "serving.busy"):
            served.predict(ROWS, patience=1e9)
        assert exchange.PATIENCE / 2 < sum(slept) <= exchange.PATIENCE
        assert len(slept) < 15
        assert slept[-1] > 4
        with refused(EnvironmentFault, "serving.busy"):
            served.predict(ROWS, patience=0)


@pytest.mark.parametrize(
    "reply",
    [
        busy(after=None),
        busy(after="soon"),
        busy(after="-1"),
        busy(after="1e9"),
        busy(after="61"),
        busy("serving.busy", after="99999999999"),
    ],
)
def test_a_host_that_names_no_time_that_anybody_would_wait_is_not_waited_for(
    reply: httpx.Response, slept: list[float]
) -> None:
    host = ScriptedServed()
    host.instead.append(reply)
    with host.connect() as served, refused(EnvironmentFault, "serving.busy"):
        served.predict(ROWS)
    assert slept == []
    assert len(host.frames) == 1


def test_a_spent_budget_is_not_waited_for(slept: list[float]) -> None:
    host = ScriptedServed(package(budget=3))
    with host.connect() as served:
        assert served.predict(ROWS).budget_left == 0
        with refused(AccessError, "user.budget-spent"):
            served.predict(ROWS)
    assert slept == []
    assert len(host.frames) == 2


@pytest.mark.parametrize("code", ["center.failed", "serving.too-slow"])
def test_records_that_may_have_been_counted_are_asked_about_three_times_at_most(code: str, slept: list[float]) -> None:
    host = ScriptedServed()
    host.instead.extend(busy(code) for _ in range(9))
    with host.connect() as served, refused(EnvironmentFault, code):
        served.predict(ROWS)
    assert slept == [1, 1]
    assert len(host.frames) == 3


def test_a_version_that_is_served_no_more_gives_way_to_the_next() -> None:
    error = AccessError("model.unknown", "no such version", step="test", fix="Ask for another.")
    gone = httpx.Response(404, content=msgspec.json.encode({"error": "gone", "detail": error.diagnostics()}))
    host = ScriptedServed()
    with host.connect() as served:
        host.restart(package(revision=2))
        host.instead.append(gone)
        assert served.predict(ROWS).package == host.package.digest()
    assert host.paths[-1] == "/v2/models/tiny/versions/2/infer"


@pytest.mark.parametrize("code", ["center.wrong", "center.malformed"])
def test_a_center_that_cheats_is_not_asked_again(code: str, slept: list[float]) -> None:
    error = IntegrityError(code, "the center", step="test", fix="Report it.").diagnostics()
    body = msgspec.json.encode({"error": "wrong", "detail": error})
    host = ScriptedServed()
    host.instead.append(httpx.Response(503, content=body, headers={"Retry-After": "1"}))
    with host.connect() as served, refused(IntegrityError, code):
        served.predict(ROWS)
    assert slept == []


def test_an_enclave_that_was_started_anew_is_verified_anew() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        served.predict(ROWS)
        host.restart()
        assert np.array_equal(served.predict(ROWS).probabilities, probabilities_of(ROWS))
    assert host.posts == ["sessions", "infer", "infer", "sessions", "infer"]
    assert host.paths.count("/attestation") == 2


def test_a_restarted_host_is_waited_for_until_the_owner_has_handed_over_the_key(slept: list[float]) -> None:
    host = ScriptedServed()
    with host.connect() as served:
        offers = [busy("serving.no-key", after="5"), busy("serving.no-key", after="5"), None]
        host.edit["attestation"] = lambda raw: offers.pop(0) or raw
        host.instead.append(busy("serving.restarted", after="2"))
        served.predict(ROWS)
        assert slept == [5, 5]
        offers.extend(busy("serving.no-key", after="5") for _ in range(30))
        host.instead.append(busy("serving.restarted"))
        with refused(EnvironmentFault, "serving.no-key"):
            served.predict(ROWS, patience=12)
        assert slept == [5, 5, 5, 5]


@pytest.mark.parametrize(("restarts", "attested"), [(1, 2), (3, 4)])
def test_an_enclave_that_was_started_anew_since_it_attested_is_asked_again(restarts: int, attested: int) -> None:
    host, left = ScriptedServed(), [None] * restarts

    def restarted(raw: bytes) -> bytes:
        if left:
            left.pop()
            host.restart()
        return raw

    host.edit["attestation"] = restarted
    with host.connect() as served:
        served.predict(ROWS)
    assert host.paths.count("/attestation") == attested


def test_a_host_whose_enclave_is_always_another_one_is_given_up() -> None:
    host = ScriptedServed()

    def restarted(raw: bytes) -> bytes:
        host.restart()
        return raw

    host.edit["attestation"] = restarted
    with refused(ProtocolError, "nonce.unknown"), host.connect():
        pass
    assert host.posts == ["sessions"] * 4


def test_a_host_that_forgets_every_session_is_given_up() -> None:
    host = ScriptedServed()
    host.instead.extend(busy("session.unknown", status=409) for _ in range(50))
    with host.connect() as served, refused(ProtocolError, "session.unknown"):
        served.predict(ROWS)
    assert host.posts == ["sessions", *["infer", "sessions"] * 3, "infer"]


def test_a_new_session_has_a_new_key() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        served.predict(ROWS)
        first = served._session
        host.restart()
        served.predict(ROWS)
        assert served._session is not first
    assert host.frames[0][26:] != host.frames[2][26:]


def test_a_model_that_changes_in_the_middle_of_a_question_is_not_mixed() -> None:
    host = ScriptedServed()
    with host.connect() as served:

        def replace(answer: Answer) -> Answer:
            if not host.answers:
                host.restart(package(revision=2))
            return answer

        host.answer = replace
        with refused(ProtocolError, "model.changed"):
            served.predict(pictures(9, seed=1))
        assert served.predict(pictures(9, seed=1)).package == host.package.digest()


def test_threads_share_a_model_and_renew_its_session_once() -> None:
    host = ScriptedServed()
    lock = threading.Lock()
    handle = host.handle

    def one_by_one(request: httpx.Request) -> httpx.Response:
        with lock:
            return handle(request)

    host.handle = one_by_one  # type: ignore[method-assign]
    got: dict[int, NDArray[np.float32]] = {}
    with host.connect() as served:
        host.restart()

        def ask(seed: int) -> None:
            got[seed] = served.predict(pictures(2, seed=seed)).probabilities

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert host.posts.count("sessions") == 2
    assert all(np.array_equal(got[seed], probabilities_of(pictures(2, seed=seed))) for seed in range(8))


def test_tasks_share_a_model_and_renew_its_session_once() -> None:
    host = ScriptedServed()

    async def ask() -> None:
        async with await host.connect_async() as served:
            host.restart()
            await asyncio.gather(*(served.predict(ROWS) for _ in range(8)))
            assert len(served._session._free) == UNDER_WAY

    asyncio.run(ask())
    assert host.posts.count("sessions") == 2


def test_a_cancelled_task_gives_its_lane_back() -> None:
    host = ScriptedServed()

    async def ask() -> None:
        async with await host.connect_async() as served:
            hung = asyncio.Event()

            async def hang(_: httpx.Request) -> httpx.Response:
                hung.set()
                await asyncio.Event().wait()
                raise AssertionError("never")

            served._http._transport = httpx.MockTransport(hang)
            task = asyncio.create_task(served.predict(ROWS))
            await hung.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(served._session._free) == UNDER_WAY

    asyncio.run(ask())


def test_the_async_client_waits_renews_and_gives_up_like_the_other(slept: list[float]) -> None:
    host = ScriptedServed(package(budget=6))

    async def ask() -> None:
        async with await host.connect_async() as served:
            host.restart()
            host.instead.append(busy(after="2"))
            got = await served.predict(ROWS)
            assert np.array_equal(got.probabilities, probabilities_of(ROWS))
            assert slept == [2]
            host.edit["infer"] = lambda raw: raw[:-1]
            with refused(DataError, "oip.size"):
                await served.predict(ROWS)
            with refused(AccessError, "user.budget-spent"):
                await served.predict(ROWS)

    asyncio.run(ask())


def test_what_is_sent_holds_no_record_in_clear() -> None:
    host = ScriptedServed()
    with host.connect() as served:
        served.predict(ROWS)
    assert all(row.tobytes() not in frame for row in ROWS for frame in host.frames)


def test_the_client_needs_neither_torch_nor_a_server() -> None:
    program = (
        "import sys, caltrain.client.served\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] in ('torch', 'fastapi', 'uvicorn')))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
