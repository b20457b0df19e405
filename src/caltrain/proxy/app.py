"""The proxy's HTTP interface: one served model as a standard client sees it (Open Inference Protocol v2).

    GET  /v2                              name, version, extensions
    GET  /v2/health/live, /ready          empty
    GET  /v2/models/{m}[/versions/{v}]    schema; says when the enclave is simulated
    GET  .../ready                        empty
    POST .../infer                        `input` -> `probabilities`, `class`, `class_index`

Errors are `{"error": text, "detail": {family, code, what, step, fix}}`. It serves programs of this machine only: what
a web page sends is refused, whatever name it found for this address.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caltrain import __version__
from caltrain.client.served import AsyncServedModel
from caltrain.errors import (
    AccessError,
    AttestationError,
    CaltrainError,
    DataError,
    EnvironmentFault,
    IntegrityError,
    ProtocolError,
)
from caltrain.proxy.tensors import metadata, read_records, reply_to
from caltrain.serving.oip import LENGTH_HEADER, build_reply, parse_request

MAX_BODY = 64 << 20
_MODEL = "caltrain-model"
_STATUS: dict[type[CaltrainError], int] = {
    AccessError: 403,
    AttestationError: 502,
    DataError: 422,
    EnvironmentFault: 503,
    IntegrityError: 502,
    ProtocolError: 502,
}
_BY_CODE = {
    "oip.malformed": 400,
    "oip.size": 400,
    "oip.datatype": 400,
    "http.no-such-route": 404,
    "model.unknown": 404,
    "upload.too-large": 413,
    "http.encoding": 415,
    "upload.cut-short": 400,
    "proxy.foreign-page": 403,
    "proxy.internal": 500,
    "session.busy": 429,
    "user.budget-spent": 429,
}


def create_app(served: AsyncServedModel) -> ASGIApp:
    """The application around one verified model."""
    app = FastAPI(title="CalTrain proxy", docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (CaltrainError, RequestValidationError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _render)
    _server_routes(app, served)
    _model_routes(app, served, "/v2/models/{model}")
    _model_routes(app, served, "/v2/models/{model}/versions/{version}")
    return _Front(app, served)


def _server_routes(app: FastAPI, served: AsyncServedModel) -> None:
    @app.get("/v2")
    async def server() -> Response:
        return _json({"name": "caltrain-proxy", "version": __version__, "extensions": ["binary_tensor_data"]})

    @app.get("/v2/health/live")
    async def live() -> Response:
        return Response()

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return await _ready(served)


def _model_routes(app: FastAPI, served: AsyncServedModel, path: str) -> None:
    def check(model: str, version: str | None) -> None:
        terms = served.package.terms
        if model != terms.name or version not in {None, str(terms.revision)}:
            raise AccessError(
                "model.unknown",
                f"this proxy serves {terms.name}, version {terms.revision}",
                step="find model",
                fix="Ask for that one, or start another proxy.",
            )

    @app.get(path)
    async def describe(model: str, version: str | None = None) -> Response:
        check(model, version)
        return _json(metadata(served.package, simulated=served.claims.simulated))

    @app.get(f"{path}/ready")
    async def ready(model: str, version: str | None = None) -> Response:
        check(model, version)
        return await _ready(served)

    @app.post(f"{path}/infer")
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        check(model, version)
        asked = parse_request(await _body(request), request.headers.get(LENGTH_HEADER))
        got = await served.predict(read_records(asked))
        check(model, version)  # its owner may have replaced it since
        reply, binary = reply_to(asked, got, served.package)
        body, headers = build_reply(reply, binary=binary)
        return Response(body, headers=headers | {_MODEL: got.model})


async def _ready(served: AsyncServedModel) -> Response:
    try:
        return Response(status_code=200 if await served.ready() else 503)
    except CaltrainError:
        return Response(status_code=503)


async def _body(request: Request) -> bytes:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise _bad("http.encoding", "a body with a Content-Encoding")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise _bad("upload.too-large", f"a body of more than {MAX_BODY} bytes")
    return bytes(body)


class _Front:
    """Before all else: refuses web pages, and writes on every reply which model it is of."""

    def __init__(self, app: ASGIApp, served: AsyncServedModel) -> None:
        self._app, self._served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault(_MODEL, self._served.package.model)
                if self._served.claims.simulated:
                    headers["caltrain-simulated"] = "true"
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif _is_foreign(Headers(scope=scope)):
            await _render(None, _bad("proxy.foreign-page", "a web page's request"))(scope, receive, stamped)
        else:
            await self._app(scope, receive, stamped)


def _is_foreign(headers: Headers) -> bool:
    """Browsers say which page a request is from, and by which name it found this address (DNS rebinding)."""
    host = headers.get("host", "localhost")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return "origin" in headers or not is_loopback(name)


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _render(_: Request | None, raised: Exception) -> Response:
    error = _named(raised)
    status = raised.status_code if isinstance(raised, HTTPException) else None
    status = status or _BY_CODE.get(error.code) or _STATUS.get(type(error), 400)
    headers = {"Retry-After": "2"} if status in {429, 503} and error.code != "user.budget-spent" else {}
    # The rest of a refused body is never read: the connection ends with the answer.
    return _json(
        {"error": str(error), "detail": error.diagnostics()}, status=status, headers=headers | {"Connection": "close"}
    )


def _named(error: Exception) -> CaltrainError:
    match error:
        case CaltrainError():
            return error
        case ClientDisconnect():
            return IntegrityError("upload.cut-short", "the body broke off", step="read request", fix="Send it again.")
        case HTTPException() | RequestValidationError():
            return _bad("http.no-such-route", "no such request")
        case _:
            return ProtocolError(
                "proxy.internal",
                f"the proxy failed unexpectedly: {type(error).__name__}",
                step="answer request",
                fix="Report this with the proxy's log.",
            )


def _bad(code: str, what: str) -> ProtocolError:
    return ProtocolError(
        code,
        f"a request was refused: {what}",
        step="read request",
        fix="Use a program on this machine that speaks the Open Inference Protocol (v2), without compression.",
    )


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json", headers=headers)
