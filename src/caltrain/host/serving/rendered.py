"""Errors as the protocol has them: a status, a line that says what to do, and the error's fields."""

from __future__ import annotations

from fastapi import Request, Response

from caltrain.host.http_faults import json_response, named, status_of

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
    error = named(raised)
    headers = {"Retry-After": str(_RETRY[error.code])} if error.code in _RETRY else {}
    if request.method != "GET" and "caltrain.whole" not in request.scope:
        headers["Connection"] = "close"  # the rest of a refused body is never read
    line = f"{error.code}: {error.what.rstrip('.')}. {error.fix}"
    return json_response(
        {"error": line, "detail": error.diagnostics()}, status=status_of(raised, _BY_CODE), headers=headers
    )
