"""The HTTP interface of the host (JSON; shards and sealed parts as bytes). It stores and forwards; it reads nothing.

    GET  /v1/plan                              the plan (canonical JSON)
    GET  /v1/run                               phase, progress, who is waited for, error; says when simulated
    POST /v1/run/start                         the operator: begin once all is in
    POST /v1/run/cut?front=                    the operator: move the cut when the next epoch begins
    GET  /v1/attestation?purpose=&nonce=       evidence bundle
    POST /v1/parties/{party}/approval          DSSE plan-approval
    PUT  /v1/parties/{party}/shards/{shard}    sealed shard (streamed)
    POST /v1/parties/{party}/provision         DSSE provision -> DSSE provision-receipt
    GET  /v1/manifest                          DSSE run-manifest
    POST /v1/parties/{party}/countersignature  DSSE manifest-approval
    GET  /v1/artifacts/{name}?offset=          what the run left, from that byte on: see `ARTIFACTS`
    POST /v1/users/{user}/query                DSSE query -> sealed answer
    POST /v1/parties/{party}/disclosure        DSSE disclosure-note
    POST /v1/parties/{party}/rejoin            DSSE rejoin: the run may be taken up
    POST /v1/parties/{party}/cut               DSSE move-cut: the FrontNet may become shallower
    POST /v1/parties/{party}/vote              DSSE exposure-vote: the cut of the coming epoch

Errors are `{"error": {family, code, what, step, fix}}`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse

from caltrain.attestation.evidence import Nonce, Purpose
from caltrain.crypto.digests import canonical_json
from caltrain.crypto.dsse import MAX_ENVELOPE_BYTES, Envelope, envelope_from_json
from caltrain.errors import (
    AccessError,
    ProtocolError,
)
from caltrain.host.conductor import Conductor
from caltrain.host.http_faults import HANDLED, bad_argument, json_response, named, status_of
from caltrain.host.uploads import receive_shard
from caltrain.models.spec import Cut

MAX_NOTE = 1 << 20
ARTIFACTS = re.compile(
    r"center|log\.jsonl|(release|suspicion|semi-trained)\.json|chain\.jsonl|(release|suspicion|semi-trained)/[a-z0-9-]{1,40}"
    r"|countersignatures/[a-z0-9-]{1,40}\.json"
)
_BY_CODE = {
    "upload.too-large": 413,
    "user.budget-spent": 429,
    "user.too-fast": 429,
    "storage.full": 507,
    "http.no-such-artifact": 404,
    "host.internal": 500,
}


def create_app(conductor: Conductor) -> FastAPI:
    """The application around one run."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        conductor.begin()
        yield
        await run_in_threadpool(conductor.stop)

    app = FastAPI(title="CalTrain host", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in HANDLED:
        app.add_exception_handler(kind, _render)
    _run_routes(app, conductor)
    _party_routes(app, conductor)

    @app.post("/v1/users/{user}/query")
    async def query(user: str, request: Request) -> Response:
        conductor.plan.user(user)
        envelope = await _envelope(request, MAX_ENVELOPE_BYTES)
        return Response(await run_in_threadpool(conductor.query, user, envelope), media_type="application/octet-stream")

    return app


def _run_routes(app: FastAPI, conductor: Conductor) -> None:
    @app.get("/v1/plan")
    async def plan() -> Response:
        return Response(canonical_json(conductor.plan), media_type="application/json")

    @app.get("/v1/run")
    async def run() -> Response:
        return json_response(conductor.status)

    @app.post("/v1/run/start")
    async def start() -> Response:
        conductor.start_training()
        return json_response(conductor.status)

    @app.post("/v1/run/cut")
    async def cut(front: int) -> Response:
        conductor.ask_cut(_convert(front, Cut))
        return json_response(conductor.status)

    @app.get("/v1/attestation")
    async def attestation(purpose: str, nonce: str) -> Response:
        checked = _convert((purpose, nonce), tuple[Purpose, Nonce])
        return json_response(await run_in_threadpool(conductor.attest, *checked))

    @app.get("/v1/manifest")
    async def manifest() -> Response:
        if conductor.manifest is None:
            raise ProtocolError(
                "host.not-yet", "there is no manifest yet", step="get manifest", fix="Wait until all parties are in."
            )
        return FileResponse(conductor.store.path("manifest.json"), media_type="application/json")

    @app.get("/v1/artifacts/{name:path}")
    async def artifact(name: str, offset: Annotated[int, Query(ge=0)] = 0) -> Response:
        if not ARTIFACTS.fullmatch(name) or not conductor.store.path(name).is_file():
            raise AccessError(
                "http.no-such-artifact", f"no artifact {name[:80]!r}", step="get artifact", fix="Wait for its phase."
            )
        size, pieces = conductor.store.snapshot(name, offset=offset)
        length = {"Content-Length": str(size)}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=length)


def _party_routes(app: FastAPI, conductor: Conductor) -> None:
    def forward(what: str, action: Callable[[str, Envelope], Envelope | None]) -> None:
        @app.post(f"/v1/parties/{{party}}/{what}")
        async def post(party: str, request: Request) -> Response:
            conductor.plan.party(party)
            answer = await run_in_threadpool(action, party, await _envelope(request, MAX_NOTE))
            return json_response(answer if answer is not None else {"accepted": True})

    forward("approval", conductor.approve)
    forward("provision", conductor.provision)
    forward("countersignature", conductor.countersign)
    forward("disclosure", conductor.disclose)
    forward("rejoin", conductor.rejoin)
    forward("cut", conductor.agree_cut)
    forward("vote", conductor.vote)

    @app.put("/v1/parties/{party}/shards/{shard}")
    async def put_shard(party: str, shard: str, request: Request) -> Response:
        header = await receive_shard(
            conductor.store, conductor.plan, party, shard, request, replace=conductor.manifest is None
        )
        conductor.notify()
        return json_response(header)


async def _render(_: Request, raised: Exception) -> Response:
    status = status_of(raised, _BY_CODE)
    headers = {"Retry-After": "2"} if status in {429, 503} else {}
    # The rest of a refused body is never read: the connection ends with the answer.
    body = {"error": named(raised).diagnostics()}
    return json_response(body, status=status, headers=headers | {"Connection": "close"})


async def _envelope(request: Request, limit: int) -> Envelope:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ProtocolError(
                "upload.too-large",
                f"a body of more than {limit} bytes",
                step="receive message",
                fix="Send the message that the caltrain command wrote, nothing else.",
            )
    return envelope_from_json(bytes(body), step="receive message")


def _convert(value: Any, type_: Any) -> Any:
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise bad_argument(str(error)) from None
