"""The HTTP interface of a serving host: Open Inference Protocol v2, blind to what it carries.

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{m}[/versions/{v}], .../ready
    POST /v2/models/{m}[/versions/{v}]/infer      a sealed request (extension `caltrain_sealed`) -> a sealed answer
    GET  /attestation?nonce=&model=[&version=]    {"package": the signed manifest, "bundle": evidence of the enclave}
    POST /v2/models/{m}[/versions/{v}]/sessions   JSON SessionRequest -> what the enclave sealed for the user
    POST /v2/models/{m}[/versions/{v}]/grant      JSON envelope of the owner -> JSON envelope of the enclave's receipt
    GET  /metrics                                 Prometheus

Errors are `{"error": "<code>: <what>. <fix>", "detail": {family, code, what, step, fix}}`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response

from caltrain import __version__
from caltrain.attestation.evidence import Nonce
from caltrain.crypto.decoders import json_decoder
from caltrain.crypto.dsse import envelope_from_json
from caltrain.errors import UNDECODABLE
from caltrain.host.http_faults import HANDLED, bad_argument, json_response
from caltrain.host.serving.bodies import Bodies
from caltrain.host.serving.metrics import CONTENT_TYPE, Metrics
from caltrain.host.serving.registry import Registry
from caltrain.host.serving.rendered import render
from caltrain.serving.oip import (
    EXTENSIONS,
    LENGTH_HEADER,
    SEALED,
    pack_sealed_reply,
    unpack_sealed,
)
from caltrain.serving.session import SessionRequest, read_head

MAX_NOTE = 64 << 10
_TENSORS = [{"name": SEALED, "datatype": "UINT8", "shape": [-1]}]
Life = Callable[[], Awaitable[None]]
T = TypeVar("T")


async def _nothing() -> None:
    """What happens where nothing is due."""


def create_app(
    registry: Registry, metrics: Metrics, *, begin: Life = _nothing, bodies: Bodies | None = None
) -> FastAPI:
    """The application around models. `begin` is awaited before it answers; the models end with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await begin()
        yield
        await registry.stop()

    app = FastAPI(title="CalTrain serving host", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in HANDLED:
        app.add_exception_handler(kind, render)
    routes = _Routes(registry, metrics, bodies or Bodies())
    for place in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.add_route(f"{place}/infer", routes.infer, methods=["POST"])
        app.add_route(f"{place}/sessions", routes.sessions, methods=["POST"])
        app.add_route(f"{place}/grant", routes.grant, methods=["POST"])
        app.add_route(f"{place}/ready", routes.model_ready, methods=["GET"])
        app.add_route(place, routes.model, methods=["GET"])
    app.add_route("/attestation", routes.attestation, methods=["GET"])
    app.add_route("/metrics", routes.metrics, methods=["GET"])
    app.add_route("/v2/health/live", routes.live, methods=["GET"])
    app.add_route("/v2/health/ready", routes.ready, methods=["GET"])
    app.add_route("/v2", routes.server, methods=["GET"])
    return app


class _Routes:
    """Plain Starlette routes: a sealed request passes through nothing that it does not need."""

    def __init__(self, registry: Registry, metrics: Metrics, bodies: Bodies) -> None:
        self._registry, self._metrics, self._bodies = registry, metrics, bodies

    async def infer(self, request: Request) -> Response:
        model = self._registry.find(*_named(request))
        with model.meters.timed(), self._registry.request():
            body = await self._bodies.read(request, model.limit)
            request_id, frame = unpack_sealed(body, request.headers.get(LENGTH_HEADER))
            session = read_head(frame).session
            if session not in model.sessions:
                model = self._registry.find(*_named(request), session=session)
            sealed = await model.infer(frame, session, gone=request.is_disconnected)
        raw, headers = pack_sealed_reply(model.name, str(model.version), request_id, sealed)
        return Response(raw, headers=headers)

    async def sessions(self, request: Request) -> Response:
        with self._registry.request():
            model = self._registry.find(*_named(request))
            asked = _decoded(await self._bodies.read(request, MAX_NOTE), SessionRequest)
            return Response(await model.open_session(asked), media_type="application/octet-stream")

    async def grant(self, request: Request) -> Response:
        with self._registry.request():
            model = self._registry.to_grant(*_named(request))
            raw = await self._bodies.read(request, MAX_NOTE)
            return json_response(await model.grant(envelope_from_json(raw, step="grant key")))

    async def attestation(self, request: Request) -> Response:
        asked = request.query_params
        try:
            nonce = msgspec.convert(asked.get("nonce"), Nonce)
        except msgspec.ValidationError:
            raise bad_argument("a nonce is 64 hexadecimal digits") from None
        if "model" not in asked:
            raise bad_argument("no model is named")
        model = self._registry.find(asked["model"], asked.get("version"))
        return json_response({"package": model.envelope, "bundle": await model.attest(nonce)})

    async def server(self, _: Request) -> Response:
        return json_response({"name": "caltrain", "version": __version__, "extensions": EXTENSIONS})

    async def live(self, _: Request) -> Response:
        return Response()

    async def ready(self, _: Request) -> Response:
        self._registry.check_ready()
        return Response()

    async def model(self, request: Request) -> Response:
        model = self._registry.find(*_named(request))
        versions = [str(served.version) for served in self._registry.versions(model.name)]
        return json_response(
            {
                "name": model.name,
                "versions": versions,
                "platform": "caltrain_sealed",
                "inputs": _TENSORS,
                "outputs": _TENSORS,
            }
        )

    async def model_ready(self, request: Request) -> Response:
        self._registry.find(*_named(request)).check_open()
        return Response()

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})


def _named(request: Request) -> tuple[str, str | None]:
    return request.path_params["model"], request.path_params.get("version")


def _decoded(raw: bytes, type_: type[T]) -> T:
    try:
        return json_decoder(type_).decode(raw)
    except UNDECODABLE:
        raise bad_argument(f"the body is no {type_.__name__}") from None
