"""What can go wrong with a request, as errors of ours: a caller of either server gets no other form."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response
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


def named(raised: Exception) -> CaltrainError:
    """The error as one of ours."""
    match raised:
        case CaltrainError():
            return raised
        case RequestValidationError():
            return bad_argument("an argument is missing or malformed")
        case ClientDisconnect():
            return IntegrityError("upload.cut-short", "the upload broke off", step="read request", fix="Send it again.")
        case HTTPException():
            return ProtocolError(
                "http.no-such-route",
                f"no such request: {raised.detail}",
                step="read request",
                fix="Use this version's.",
            )
        case _:
            return ProtocolError(
                "host.internal",
                f"the host failed unexpectedly: {type(raised).__name__}",
                step="answer request",
                fix="Report this with the host's log.",
            )


def status_of(raised: Exception, by_code: dict[str, int]) -> int:
    """The HTTP status of what was raised: the framework's own, else by code, else by family."""
    if isinstance(raised, HTTPException):
        return raised.status_code
    error = named(raised)
    return by_code.get(error.code) or _BY_FAMILY.get(type(error), 400)


def bad_argument(what: str) -> ProtocolError:
    """Something in a request is not what this interface takes."""
    return ProtocolError("http.bad-argument", what, step="read request", fix="Send what this version's commands send.")


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json", headers=headers)
