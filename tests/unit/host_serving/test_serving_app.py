"""The HTTP interface of a serving host, over the real enclave loop: what it answers, and what it refuses unread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.requests import Request

from caltrain.boundary.serving import CloseSession, Infer
from caltrain.crypto.dsse import Envelope
from caltrain.errors import IntegrityError, ProtocolError
from caltrain.host.serving import bodies as bodies_module
from caltrain.host.serving import model as model_module
from caltrain.host.serving import sessions as sessions_module
from caltrain.host.serving.bodies import Bodies
from caltrain.host.serving.stream import Stream
from caltrain.serving.oip import pack_sealed
from support.samples import refused
from support.serving_host import Host, error_of, hosted, pictures, sealed_of, tiny_folder

Play = Callable[[Host], Awaitable[None]]
OVERHEAD = 42
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    tiny_folder(folder, head=2, budget=1000)
    return folder


def played(folder: Path, play: Play, *, granted: bool = True, bodies: Bodies | None = None) -> None:
    """Run a test against a host that serves the tiny model."""

    async def body() -> None:
        from caltrain.serving.folder import open_folder

        async with asyncio.timeout(60), hosted(open_folder(folder), bodies=bodies) as host:
            if granted:
                await host.grant()
            await play(host)

    asyncio.run(body())


@pytest.fixture(name="sent")
def _sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the host sends to enclaves."""
    seen: list[Any] = []
    post = Stream.post

    def watched(stream: Stream, message: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(message)
        return post(stream, message, *args, **kwargs)

    monkeypatch.setattr(Stream, "post", watched)
    return seen


def test_the_servers_and_the_models_metadata_are_the_protocols(folder: Path) -> None:
    async def play(host: Host) -> None:
        get = host.client.get
        server = (await get("/v2")).json()
        assert server["extensions"] == ["binary_tensor_data", "caltrain_sealed"]
        assert set(server) == {"name", "version", "extensions"}
        tensors = [{"name": "sealed", "datatype": "UINT8", "shape": [-1]}]
        for place in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
            model = (await get(place)).json()
            assert (model["name"], model["versions"]) == ("tiny", ["1"])
            assert model["inputs"] == model["outputs"] == tensors
        for place in (
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/tiny/ready",
            "/v2/models/tiny/versions/1/ready",
        ):
            assert ((await get(place)).status_code, (await get(place)).content) == (200, b""), place

    played(folder, play)


def test_a_sealed_request_is_answered_by_the_models_own_numbers(folder: Path) -> None:
    async def play(host: Host) -> None:
        una, pat = await host.session("una"), await host.session("pat")
        records = [pictures(2, seed=1), pictures(1, seed=2)]
        replies = await asyncio.gather(host.infer(una.seal(records[0])), host.infer(pat.seal(records[1])))
        for user, reply, rows in zip((una, pat), replies, records, strict=True):
            table = user.table(sealed_of(reply))
            assert table.shape == (len(rows), 3)
            assert table.sum(1).tolist() == pytest.approx([1.0] * len(rows))
            again = user.table(sealed_of(await host.infer(user.seal(rows), place="/v2/models/tiny/versions/1")))
            assert again == pytest.approx(table, abs=1e-5)
        assert {reply.headers["content-type"] for reply in replies} == {"application/octet-stream"}
        assert b'"model_version":"1"' in replies[0].content
        assert b'"id":"7"' in replies[0].content

    played(folder, play)


def test_before_the_owner_came_evidence_is_given_and_nothing_else(folder: Path, sent: list[Any]) -> None:
    async def play(host: Host) -> None:
        await host.until("waiting-for-key")
        await host.attest()
        request, _, _ = await host.demand("una")
        before = len(sent)
        for got in (
            await host.infer(b"\1" + bytes(OVERHEAD + 15)),
            await host.client.post("/v2/models/tiny/sessions", content=msgspec.json.encode(request)),
            await host.client.get("/v2/health/ready"),
            await host.client.get("/v2/models/tiny/ready"),
        ):
            assert error_of(got) == (503, "serving.no-key")
            assert int(got.headers["retry-after"]) > 0
        assert (await host.client.get("/v2/health/live")).status_code == 200
        assert len(sent) == before

    played(folder, play, granted=False)


async def _foreign(host: Host) -> httpx.Response:
    return await host.infer(b"\1" + bytes(16) + (await host.session("una")).seal(pictures(1))[17:])


async def _rows(host: Host, size: int) -> httpx.Response:
    return await host.infer((await host.session("una")).seal(bytes(size)))


async def _plain(host: Host) -> httpx.Response:
    inputs = [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0.5]}]
    return await host.client.post(INFER, json={"inputs": inputs})


async def _cut(host: Host) -> httpx.Response:
    body, headers = pack_sealed((await host.session("una")).seal(pictures(1)))
    return await host.client.post(INFER, content=body[:-1], headers=headers)


async def _long(host: Host) -> httpx.Response:
    return await host.client.post(INFER, content=bytes(host.model.limit + 1))


async def _long_without_length(host: Host) -> httpx.Response:
    async def pieces() -> Any:
        for _ in range(host.model.limit // 1024 + 2):
            yield bytes(1024)

    return await host.client.post(INFER, content=pieces())


async def _compressed(host: Host) -> httpx.Response:
    return await host.client.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"})


def _post(place: str, raw: bytes = b"{}") -> Callable[[Host], Awaitable[httpx.Response]]:
    async def post(host: Host) -> httpx.Response:
        return await host.client.post(place, content=raw)

    return post


def _get(place: str) -> Callable[[Host], Awaitable[httpx.Response]]:
    async def get(host: Host) -> httpx.Response:
        return await host.client.get(place)

    return get


NONCE = "ab" * 32
REFUSED: dict[str, tuple[Callable[[Host], Awaitable[httpx.Response]], int, str]] = {
    "an unknown model": (_post("/v2/models/other/infer"), 404, "model.unknown"),
    "an unknown version": (_post("/v2/models/tiny/versions/2/infer"), 404, "model.unknown"),
    "a version that is no number": (_get("/v2/models/tiny/versions/x"), 404, "model.unknown"),
    "a session of nobody": (_foreign, 409, "session.unknown"),
    "no records": (lambda host: _rows(host, 0), 422, "request.rows"),
    "half a record": (lambda host: _rows(host, 24), 422, "request.rows"),
    "too many records": (lambda host: _rows(host, 16 * 5), 422, "request.rows"),
    "inputs in clear": (_plain, 400, "infer.sealed-only"),
    "no sealed request": (lambda host: host.infer(b"short"), 400, "request.malformed"),
    "less than its header says": (_cut, 400, "oip.size"),
    "no JSON": (_post(INFER, b"\xff"), 400, "oip.malformed"),
    "too large a body": (_long, 413, "upload.too-large"),
    "too large a body without a length": (_long_without_length, 413, "upload.too-large"),
    "a compressed body": (_compressed, 415, "http.encoding"),
    "a session request that is none": (_post("/v2/models/tiny/sessions"), 400, "http.bad-argument"),
    "a grant that is none": (_post("/v2/models/tiny/grant"), 422, "envelope.malformed"),
    "a bad nonce": (_get("/attestation?model=tiny&nonce=12"), 400, "http.bad-argument"),
    "no nonce": (_get("/attestation?model=tiny"), 400, "http.bad-argument"),
    "evidence of no model": (_get(f"/attestation?nonce={NONCE}"), 400, "http.bad-argument"),
    "evidence of another model": (_get(f"/attestation?nonce={NONCE}&model=x"), 404, "model.unknown"),
    "another path": (_get("/v1/run"), 404, "http.no-such-route"),
    "another method": (_get(INFER), 405, "http.no-such-route"),
    "documentation": (_get("/docs"), 404, "http.no-such-route"),
}


@pytest.fixture(scope="module", name="refusals")
def _refusals(folder: Path) -> dict[str, tuple[httpx.Response, bool]]:
    """All of them against one host, which then still serves; whether the enclave heard of a request."""
    found: dict[str, tuple[httpx.Response, bool]] = {}
    heard: list[Any] = []
    post = Stream.post

    def watched(stream: Stream, message: Any, *args: Any, **kwargs: Any) -> Any:
        heard.append(message)
        return post(stream, message, *args, **kwargs)

    async def play(host: Host) -> None:
        for name, (ask, _, _) in REFUSED.items():
            before = sum(isinstance(message, Infer) for message in heard)
            found[name] = (await ask(host), sum(isinstance(message, Infer) for message in heard) > before)
        una = await host.session("una")
        una.table(sealed_of(await host.infer(una.seal(pictures(1)))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "post", watched)
        played(folder, play)
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_has_its_own_error_reaches_no_enclave_and_the_service_goes_on(
    refusals: dict[str, tuple[httpx.Response, bool]], name: str
) -> None:
    got, reached = refusals[name]
    assert error_of(got) == REFUSED[name][1:]
    assert not reached


def test_what_the_enclave_refuses_keeps_its_code_and_reaches_its_caller_alone(folder: Path) -> None:
    async def play(host: Host) -> None:
        una, pat = await host.session("una"), await host.session("pat")
        frame = una.seal(pictures(1))
        sealed_of(await host.infer(frame))
        forged = bytearray(una.seal(pictures(1)))
        forged[-1] ^= 1
        replayed, honest, touched = await asyncio.gather(
            host.infer(frame), host.infer(pat.seal(pictures(1))), host.infer(bytes(forged))
        )
        assert error_of(replayed) == (409, "request.replayed")
        assert error_of(touched) == (422, "sealed.not-authentic")
        pat.table(sealed_of(honest))
        request, _, _ = await host.demand("mallory")
        got = await host.client.post("/v2/models/tiny/sessions", content=msgspec.json.encode(request))
        assert error_of(got) == (403, "user.not-named")

    played(folder, play)


def test_a_spent_budget_is_429_and_not_to_be_retried(tmp_path: Path) -> None:
    tiny_folder(tmp_path, head=2, budget=3)

    async def play(host: Host) -> None:
        una = await host.session("una")
        sealed_of(await host.infer(una.seal(pictures(3))))
        got = await host.infer(una.seal(pictures(1)))
        assert error_of(got) == (429, "user.budget-spent")
        assert "retry-after" not in got.headers
        assert error_of(await host.infer((await host.session("una")).seal(pictures(1)))) == (429, "user.budget-spent")

    played(tmp_path, play)


def test_one_session_has_only_so_much_under_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "MOST_UNDER_WAY", 2)

    async def play(host: Host) -> None:
        una, pat = await host.session("una"), await host.session("pat")
        asked = [host.infer(una.seal(pictures(1), lane=lane)) for lane in range(4)]
        replies = await asyncio.gather(*asked, host.infer(pat.seal(pictures(1))))
        refused = [got for got in replies if got.status_code != 200]
        assert [error_of(got) for got in refused] == [(429, "session.busy")] * 2
        assert all(int(got.headers["retry-after"]) > 0 for got in refused)
        assert replies[-1].status_code == 200
        sealed_of(await host.infer(una.seal(pictures(1), lane=9)))

    played(folder, play)


def test_a_session_that_was_idle_for_long_is_closed_in_the_enclave_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sent: list[Any]
) -> None:
    async def play(host: Host) -> None:
        una = await host.session("una")
        monkeypatch.setattr(sessions_module, "IDLE_SECONDS", -1.0)
        pat = await host.session("pat")
        assert CloseSession(una.opened.session) in sent
        assert error_of(await host.infer(una.seal(pictures(1)))) == (409, "session.unknown")
        pat.table(sealed_of(await host.infer(pat.seal(pictures(1)))))

    played(folder, play)


def test_a_session_that_the_enclave_forgot_is_forgotten_here(folder: Path) -> None:
    async def play(host: Host) -> None:
        una = await host.session("una")
        enclave = host.model._enclave
        assert enclave is not None
        enclave.ask(CloseSession(una.opened.session)).result(20)
        for _ in range(2):
            assert error_of(await host.infer(una.seal(pictures(1)))) == (409, "session.unknown")
            assert una.opened.session not in host.model.sessions

    played(folder, play)


def test_a_full_queue_is_503_and_to_be_retried(folder: Path) -> None:
    async def play(host: Host) -> None:
        una = await host.session("una")
        host.model.batcher.rows = 8 * 4
        got = await host.infer(una.seal(pictures(1)))
        assert error_of(got) == (503, "serving.busy")
        assert got.headers["retry-after"] == "1"
        host.model.batcher.rows = 0
        sealed_of(await host.infer(una.seal(pictures(1))))

    played(folder, play)


def test_no_answer_is_waited_for_longer_than_a_minute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(host: Host) -> None:
        una = await host.session("una")
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "ANSWER_SECONDS", 0.0)
            assert error_of(await host.infer(una.seal(pictures(1)))) == (503, "serving.too-slow")
        sealed_of(await host.infer(una.seal(pictures(1))))

    played(folder, play)


def test_a_slow_body_ends_and_so_does_one_that_breaks_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "SLOW_SECONDS", 0.05)

    async def play(host: Host) -> None:
        async def slow() -> Any:
            yield b"{"
            await asyncio.sleep(5)

        got = await host.client.post(INFER, content=slow())
        assert error_of(got) == (408, "http.slow-body")
        assert got.headers["connection"] == "close"

    played(folder, play)


def test_bodies_that_take_too_much_memory_together_are_told_to_come_back(folder: Path) -> None:
    async def play(host: Host) -> None:
        una = await host.session("una")
        hold = asyncio.Event()

        async def silent() -> Any:
            await hold.wait()
            yield b"{"

        async def held() -> Any:
            yield b"{" + b" " * 3980
            await hold.wait()

        announced = [asyncio.create_task(host.client.post(INFER, content=silent())) for _ in range(3)]
        await asyncio.sleep(0.05)
        sealed_of(await host.infer(una.seal(pictures(1))))  # what was only announced keeps nobody out
        first = asyncio.create_task(host.client.post(INFER, content=held()))
        await asyncio.sleep(0.05)
        got = await host.infer(una.seal(pictures(1)))
        assert error_of(got) == (503, "serving.busy")
        hold.set()
        for late in (first, *announced):
            assert error_of(await late) == (400, "oip.malformed")
        sealed_of(await host.infer(una.seal(pictures(1))))

    played(folder, play, bodies=Bodies(most=4000))


def test_metrics_count_by_outcome_and_hold_nothing_of_users_or_sessions(folder: Path) -> None:
    async def play(host: Host) -> None:
        una = await host.session("una")
        for _ in range(3):
            sealed_of(await host.infer(una.seal(pictures(2))))
        await host.infer(una.seal(bytes(24)))
        await host.client.post("/v2/models/no-such/infer")
        got = await host.client.get("/metrics")
        assert got.headers["content-type"].startswith("text/plain")
        lines = got.text.splitlines()
        of = 'model="tiny",'
        for expected in (
            f'caltrain_requests_total{{{of}outcome="ok",version="1"}} 3.0',
            f'caltrain_requests_total{{{of}outcome="request.rows",version="1"}} 1.0',
            f'caltrain_batch_rows_count{{{of}version="1"}} 3.0',
            f'caltrain_batch_rows_sum{{{of}version="1"}} 6.0',
            f'caltrain_request_seconds_count{{{of}version="1"}} 4.0',
            f'caltrain_queue_rows{{{of}version="1"}} 0.0',
            f'caltrain_sessions{{{of}version="1"}} 1.0',
            f'caltrain_model_ready{{{of}version="1"}} 1.0',
            f'caltrain_enclave_restarts_total{{{of}version="1"}} 0.0',
        ):
            assert expected in lines, expected
        for secret in ('"una"', una.opened.session, "no-such", "cat"):
            assert secret not in got.text

    played(folder, play)


def test_an_error_of_our_own_is_named_and_tells_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(host: Host) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("secret")

        monkeypatch.setattr(host.registry, "find", broken)
        got = await host.client.get("/v2/models/tiny")
        assert error_of(got) == (500, "host.internal")
        assert "secret" not in got.text

    played(folder, play)


def test_evidence_comes_with_the_owners_manifest(folder: Path) -> None:
    async def play(host: Host) -> None:
        got = await host.client.get("/attestation", params={"nonce": NONCE, "model": "tiny", "version": "1"})
        body = got.json()
        assert msgspec.convert(body["package"], Envelope) == host.model.envelope
        assert body["bundle"]["binding"]["nonce"] == NONCE
        assert body["bundle"]["binding"]["plan"] == host.model.package.digest()
        again = await host.client.get("/attestation", params={"nonce": NONCE, "model": "tiny"})
        assert again.status_code in {200, 409}, "an enclave may refuse a nonce that it has seen"

    played(folder, play)


def test_a_body_that_breaks_off_or_lies_about_its_length_is_named() -> None:
    bodies = Bodies()

    async def read(*messages: dict[str, Any], headers: dict[str, str] | None = None) -> bytes:
        waiting = iter(messages)

        async def receive() -> dict[str, Any]:
            return next(waiting)

        raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        return await bodies.read(Request({"type": "http", "method": "POST", "headers": raw}, receive), 10)

    first = {"type": "http.request", "body": b"ab", "more_body": True}
    assert asyncio.run(read(first, {"type": "http.request", "body": b"c"})) == b"abc"
    with refused(IntegrityError, "upload.cut-short"):
        asyncio.run(read(first, {"type": "http.disconnect"}))
    for length in ("x", "-1", "9" * 19):
        with refused(ProtocolError, "http.bad-argument"):
            asyncio.run(read(first, headers={"Content-Length": length}))
    with refused(ProtocolError, "upload.too-large"):
        asyncio.run(read(headers={"Content-Length": "11"}))
    assert bodies._held == 0
