"""Errors as the protocol has them: a status, a line that says what to do, and the error's fields."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from caltrain.errors import (
    AccessError,
    CaltrainError,
    ConfigError,
    DataError,
    EnvironmentFault,
    IntegrityError,
    ProtocolError,
    ProvisioningError,
)

HANDLED = (CaltrainError, RequestValidationError, HTTPException, ClientDisconnect, Exception)
_BY_FAMILY: dict[type[CaltrainError], int] = {
    AccessError: 403,
    ConfigError: 400,
    DataError: 422,
    IntegrityError: 422,
    ProtocolError: 409,
    ProvisioningError: 422,
    EnvironmentFault: 503,
}
_BY_CODE = {
    "model.unknown": 404,
    "user.budget-spent": 429,
    "session.busy": 429,
    "request.malformed": 400,
    "infer.sealed-only": 400,
    "oip.malformed": 400,
    "oip.size": 400,
    "oip.datatype": 400,
    "http.bad-argument": 400,
    "http.slow-body": 408,
    "http.encoding": 415,
    "upload.too-large": 413,
    "upload.cut-short": 400,
    "center.wrong": 503,
    "center.malformed": 503,
    "host.internal": 500,
    "enclave.internal": 500,
}
_RETRY = {
    "serving.busy": 1,
    "session.busy": 1,
    "center.failed": 1,
    "center.wrong": 1,
    "center.malformed": 1,
    "serving.starting": 2,
    "serving.restarted": 2,
    "serving.too-slow": 2,
    "serving.no-key": 5,
    "serving.draining": 5,
}
"""Seconds after which the same, or a new session, may well work."""


async def render(request: Request, raised: Exception) -> Response:
    """The answer to a request that failed."""
    error = _named(raised)
    status = raised.status_code if isinstance(raised, HTTPException) else None
    status = status or _BY_CODE.get(error.code) or _BY_FAMILY.get(type(error), 400)
    headers = {"Retry-After": str(_RETRY[error.code])} if error.code in _RETRY else {}
    if request.method != "GET" and "caltrain.whole" not in request.scope:
        headers["Connection"] = "close"  # the rest of a refused body is never read
    line = f"{error.code}: {error.what.rstrip('.')}. {error.fix}"
    return json_response({"error": line, "detail": error.diagnostics()}, status=status, headers=headers)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json", headers=headers)


def bad_argument(what: str) -> ProtocolError:
    """Something in a request is not what this interface takes."""
    return ProtocolError("http.bad-argument", what, step="read request", fix="Send what this version's commands send.")


def _named(error: Exception) -> CaltrainError:
    match error:
        case CaltrainError():
            return error
        case RequestValidationError():
            return bad_argument("an argument is missing or malformed")
        case ClientDisconnect():
            return IntegrityError("upload.cut-short", "the body broke off", step="read request", fix="Send it again.")
        case HTTPException():
            return ProtocolError(
                "http.no-such-route", f"no such request: {error.detail}", step="read request", fix="Use this version's."
            )
        case _:
            return ProtocolError(
                "host.internal",
                f"the host failed unexpectedly: {type(error).__name__}",
                step="answer request",
                fix="Report this with the host's log.",
            )
