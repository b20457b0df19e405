"""The proxy's own interface: the protocol as standard clients know it, wrong requests refused, all replies stamped."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, cast

import httpx
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from caltrain import __version__
from caltrain.client.served import AsyncServedModel, Prediction
from caltrain.errors import CaltrainError, DataError, IntegrityError
from caltrain.proxy.app import MAX_BODY, create_app
from caltrain.serving.oip import LENGTH_HEADER, InferRequest, Tensor, build_request, parse_reply
from support import asgi
from support.proxied import LOCAL, call
from support.scripted_served import ScriptedServed, busy, package, probabilities_of
from support.tiny import CLASSES, MEASUREMENT, pictures

INFER = "/v2/models/tiny/infer"
ROWS = pictures(2, seed=5)
INPUT = {"name": "input", "datatype": "UINT8", "shape": list(ROWS.shape), "data": ROWS.ravel().tolist()}


def body(**changes: Any) -> bytes:
    """A request in JSON, which `changes` change."""
    whole: dict[str, Any] = {"inputs": [INPUT]}
    return msgspec.json.encode(whole | changes)


def failed(answer: httpx.Response, status: int, code: str) -> str:
    """The answer must be this error, and stamped. Returns its text."""
    assert answer.status_code == status, answer.text
    fields = answer.json()
    assert set(fields) == {"error", "detail"}
    assert set(fields["detail"]) == {"family", "code", "what", "step", "fix"}
    assert fields["detail"]["code"] == code
    assert fields["error"].startswith(f"{code}: ")
    assert answer.headers["caltrain-simulated"] == "true"
    return str(fields["error"])


def test_the_server_says_what_it_is() -> None:
    answer = call(ScriptedServed(), "GET", "/v2")
    assert answer.json() == {"name": "caltrain-proxy", "version": __version__, "extensions": ["binary_tensor_data"]}


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready"])
def test_health_is_an_empty_200(path: str) -> None:
    host = ScriptedServed()
    answer = call(host, "GET", path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["caltrain-simulated"] == "true"
    assert answer.headers["caltrain-model"] == host.package.model


def test_an_answer_is_stamped_with_the_model_that_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, other = AsyncServedModel.predict, "sha256:" + "0" * 64

    async def predicted(served: AsyncServedModel, records: NDArray[np.generic]) -> Prediction:
        return dataclasses.replace(await predict(served, records), model=other)

    monkeypatch.setattr(AsyncServedModel, "predict", predicted)
    assert call(ScriptedServed(), "POST", INFER, content=body()).headers["caltrain-model"] == other


def test_a_version_that_was_named_is_not_answered_by_the_next_one() -> None:
    host = ScriptedServed()

    async def run() -> list[httpx.Response]:
        async with await host.connect_async() as served:
            transport = httpx.ASGITransport(create_app(served))
            async with httpx.AsyncClient(base_url=LOCAL, transport=transport) as http:
                host.restart(package(revision=2))
                return [await http.post(f"/v2/models/tiny{v}/infer", content=body()) for v in ("/versions/1", "")]

    named, any_ = asyncio.run(run())
    failed(named, 404, "model.unknown")
    assert any_.json()["model_version"] == "2"


@pytest.mark.parametrize("what", [busy("serving.no-key"), None])
def test_a_model_is_as_ready_as_its_host(what: httpx.Response | None) -> None:
    host = ScriptedServed()

    def gone(raw: bytes) -> httpx.Response:
        if what is None:
            raise httpx.ConnectError("gone")
        return what

    host.edit["ready"] = gone
    assert call(host, "GET", "/v2/health/live").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/tiny/versions/1/ready"):
        answer = call(host, "GET", path)
        assert (answer.status_code, answer.content) == (503, b"")


@pytest.mark.parametrize(("dtype", "datatype"), [("u8", "UINT8"), ("f32", "FP32")])
@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/3"])
def test_the_metadata_are_those_of_the_package(dtype: str, datatype: str, path: str) -> None:
    served = package(dtype=dtype, revision=3)
    assert call(ScriptedServed(served), "GET", path).json() == {
        "name": "tiny",
        "versions": ["3"],
        "platform": "caltrain",
        "inputs": [{"name": "input", "datatype": datatype, "shape": [-1, 1, 4, 4]}],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "class", "datatype": "BYTES", "shape": [-1]},
            {"name": "class_index", "datatype": "INT64", "shape": [-1]},
        ],
        "parameters": {
            "caltrain_simulated": True,
            "caltrain_package": served.digest(),
            "caltrain_model": served.model,
            "caltrain_measurement": MEASUREMENT,
        },
    }


@pytest.mark.parametrize("path", [INFER, "/v2/models/tiny/versions/1/infer"])
def test_json_in_json_out(path: str) -> None:
    host = ScriptedServed()
    answer = call(host, "POST", path, content=body(id="mine"))
    expected = probabilities_of(ROWS)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["caltrain-model"] == host.package.model
    got = answer.json()
    assert (got["model_name"], got["model_version"], got["id"]) == ("tiny", "1", "mine")
    outputs = {output["name"]: output for output in got["outputs"]}
    assert list(outputs) == ["probabilities", "class", "class_index"]
    assert np.array_equal(np.array(outputs["probabilities"]["data"], np.float32).reshape(2, 3), expected)
    assert outputs["class"]["data"] == [CLASSES[i] for i in expected.argmax(1)]
    assert outputs["class_index"]["data"] == expected.argmax(1).tolist()
    assert [output["shape"] for output in got["outputs"]] == [[2, 3], [2], [2]]


def test_binary_in_binary_out() -> None:
    rows = pictures(9, seed=2, dtype="f32")
    request = InferRequest(inputs=(Tensor("input", "FP32", rows.shape, rows),), parameters={"binary_data_output": True})
    content, headers = build_request(request, binary={"input"})
    answer = call(ScriptedServed(package(dtype="f32")), "POST", INFER, content=content, headers=headers)
    probabilities, names, indices = parse_reply(answer.content, answer.headers[LENGTH_HEADER]).outputs
    assert np.array_equal(probabilities.values, probabilities_of(rows))
    assert names.values == tuple(CLASSES[i].encode() for i in probabilities_of(rows).argmax(1))
    assert np.array_equal(indices.values, probabilities_of(rows).argmax(1))


def test_only_the_outputs_that_were_asked_for_come_back_as_they_were_asked_for() -> None:
    outputs = [{"name": "class_index"}, {"name": "probabilities", "parameters": {"binary_data": True}}]
    answer = call(ScriptedServed(), "POST", INFER, content=body(outputs=outputs))
    length = int(answer.headers[LENGTH_HEADER])
    heads = msgspec.json.decode(answer.content[:length])["outputs"]
    assert [head["name"] for head in heads] == ["class_index", "probabilities"]
    assert ["data" in head for head in heads] == [True, False]
    assert answer.content[length:] == probabilities_of(ROWS).tobytes()


@pytest.mark.parametrize(
    ("status", "code", "content"),
    [
        (400, "oip.malformed", b""),
        (400, "oip.malformed", b"not json"),
        (400, "oip.malformed", body(inputs=[])),
        (400, "oip.malformed", body(more=1)),
        (400, "oip.size", body(inputs=[INPUT | {"shape": [3, 1, 4, 4]}])),
        (400, "oip.datatype", body(inputs=[INPUT | {"datatype": "FP16"}])),
        (422, "infer.inputs", body(inputs=[INPUT | {"name": "image"}])),
        (422, "infer.inputs", body(inputs=[INPUT, INPUT | {"name": "more"}])),
        (422, "infer.inputs", body(inputs=[INPUT | {"datatype": "BYTES", "shape": [1], "data": ["x"]}])),
        (422, "infer.outputs", body(outputs=[{"name": "logits"}])),
        (422, "infer.outputs", body(outputs=[{"name": "class", "parameters": {"classification": 3}}])),
        (422, "ask.shape", body(inputs=[INPUT | {"shape": [2, 16]}])),
        (422, "ask.shape", body(inputs=[INPUT | {"shape": [32]}])),
        (422, "ask.shape", body(inputs=[INPUT | {"datatype": "INT64"}])),
        (422, "ask.shape", body(inputs=[INPUT | {"datatype": "FP32"}])),
    ],
)
def test_a_wrong_request_is_refused_and_nothing_is_sealed(status: int, code: str, content: bytes) -> None:
    host = ScriptedServed()
    answer = call(host, "POST", INFER, content=content)
    failed(answer, status, code)
    assert "connection" in answer.headers
    assert host.frames == []


def test_a_record_that_is_not_finite_is_refused() -> None:
    host = ScriptedServed(package(dtype="f32"))
    data = [1e300] + [0.0] * 31
    answer = call(host, "POST", INFER, content=body(inputs=[INPUT | {"datatype": "FP32", "data": data}]))
    failed(answer, 422, "ask.not-finite")
    assert host.frames == []


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/tiny/versions/2", "/v2/models/tiny/versions/x"])
@pytest.mark.parametrize(("method", "what"), [("GET", ""), ("GET", "/ready"), ("POST", "/infer")])
def test_another_model_or_version_is_not_there(path: str, method: str, what: str) -> None:
    host = ScriptedServed()
    failed(call(host, method, path + what, content=body()), 404, "model.unknown")
    assert host.frames == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/models/tiny/config", 404),
        ("GET", INFER, 405),
        ("POST", "/v2/repository/index", 404),
    ],
)
def test_what_is_not_served_is_refused_in_the_same_form(method: str, path: str, status: int) -> None:
    failed(call(ScriptedServed(), method, path), status, "http.no-such-route")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_a_packed_body_is_refused(encoding: str) -> None:
    host = ScriptedServed()
    failed(call(host, "POST", INFER, content=body(), headers={"Content-Encoding": encoding}), 415, "http.encoding")
    assert host.frames == []


def test_a_body_too_large_is_refused() -> None:
    failed(call(ScriptedServed(), "POST", INFER, content=b" " * (MAX_BODY + 1)), 413, "upload.too-large")


def test_a_body_that_breaks_off_is_refused() -> None:
    host = ScriptedServed()
    app = create_app(asyncio.run(host.connect_async()))
    answer = asgi.call(cast(FastAPI, app), "POST", INFER, chunks=[body()[:40]], breaks_off=True)
    assert (answer.status, msgspec.json.decode(answer.body)["detail"]["code"]) == (400, "upload.cut-short")
    assert host.frames == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:8001"},
        {"Origin": "null"},
        {"Host": "evil.test"},
        {"Host": "evil.test:8001"},
        {"Host": "127.0.0.1.evil.test"},
        {"Host": "10.0.0.1:8001"},
        {"Host": "[2001:db8::1]:8001"},
        {"Host": ""},
    ],
)
def test_a_web_page_gets_nothing(headers: dict[str, str]) -> None:
    host = ScriptedServed()
    failed(call(host, "POST", INFER, content=body(), headers=headers), 403, "proxy.foreign-page")
    assert host.frames == []


@pytest.mark.parametrize("name", ["localhost", "localhost:1", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8001"])
def test_programs_of_this_machine_may_use_any_of_its_own_names(name: str) -> None:
    assert call(ScriptedServed(), "GET", "/v2", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize(
    ("status", "code", "replies"),
    [
        (429, "session.busy", [busy("session.busy", status=429, after="61")]),
        (503, "serving.busy", [busy(after="61")]),
        (503, "serving.draining", [busy("serving.draining", after=None)]),
        (502, "host.garbage", [httpx.Response(500, content=b"oops")]),
        (502, "host.garbage", [httpx.Response(302, headers={"Location": "http://elsewhere.test"})]),
    ],
)
def test_what_the_host_refuses_is_said(status: int, code: str, replies: list[httpx.Response]) -> None:
    host = ScriptedServed()
    host.instead.extend(replies)
    answer = call(host, "POST", INFER, content=body())
    failed(answer, status, code)
    assert ("retry-after" in answer.headers) == (status in {429, 503})


def test_a_spent_budget_is_429_without_a_time_to_come_again() -> None:
    answer = call(ScriptedServed(package(budget=1)), "POST", INFER, content=body())
    failed(answer, 429, "user.budget-spent")
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (422, DataError("request.rows", "too many", step="test", fix="Send fewer.")),
        (502, IntegrityError("center.wrong", "it lies", step="test", fix="Report it.")),
    ],
)
def test_errors_of_the_enclave_keep_their_code(status: int, error: CaltrainError) -> None:
    host = ScriptedServed()
    content = msgspec.json.encode({"error": str(error), "detail": error.diagnostics()})
    host.instead.append(httpx.Response(422, content=content))
    failed(call(host, "POST", INFER, content=body()), status, error.code)


def test_a_host_that_shows_another_package_later_is_a_bad_gateway() -> None:
    host = ScriptedServed()
    connect = host.connect_async

    async def then_cheat(**changes: Any) -> Any:
        served = await connect(**changes)
        host.restart(package(top=1))
        return served

    host.connect_async = then_cheat  # type: ignore[method-assign]
    failed(call(host, "POST", INFER, content=body()), 502, "package.rolled-back")
    assert host.answers == []


def test_an_unexpected_failure_has_the_same_form_and_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a-secret")

    monkeypatch.setattr("caltrain.proxy.app.read_records", fail)
    assert "a-secret" not in failed(call(ScriptedServed(), "POST", INFER, content=body()), 500, "proxy.internal")


def test_an_enclave_that_is_not_simulated_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ScriptedServed()
    connect = host.connect_async

    async def real(**changes: Any) -> Any:
        served = await connect(**changes)
        served._session.claims = msgspec.structs.replace(served.claims, simulated=False)
        return served

    monkeypatch.setattr(host, "connect_async", real)
    answer = call(host, "GET", "/v2/models/tiny")
    assert "caltrain-simulated" not in answer.headers
    assert answer.json()["parameters"]["caltrain_simulated"] is False
