"""Bodies of requests, read within limits of size, time and memory. They are hostile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from caltrain.errors import IntegrityError, ProtocolError
from caltrain.host.serving.faults import busy

SLOW_SECONDS = 20.0
MOST_HELD = 512 << 20
"""Bytes that all bodies which are being read may take together."""

_STEP = "receive request"


class Bodies:
    """Reads bodies. What came of them is counted: who only announces much keeps nobody out."""

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most, self._held = most, 0

    async def read(self, request: Request, limit: int) -> bytes:
        """A whole body of at most `limit` bytes.

        Raises ProtocolError `http.encoding`, `upload.too-large`, `http.slow-body`, `http.bad-argument`,
        IntegrityError `upload.cut-short`, EnvironmentFault `serving.busy`.
        """
        _check_header(request, limit)
        body = bytearray()
        try:
            async with asyncio.timeout(SLOW_SECONDS):
                async for piece in _pieces(request):
                    body += piece
                    self._held += len(piece)
                    if len(body) > limit:
                        raise _too_large(limit)
                    if self._held > self._most:
                        raise busy("the bodies that are being read take all the memory that they may")
        except TimeoutError:
            raise ProtocolError(
                "http.slow-body",
                f"the body did not come within {SLOW_SECONDS:g} seconds",
                step=_STEP,
                fix="Send it at once, or over a faster network.",
            ) from None
        finally:
            self._held -= len(body)
        request.scope["caltrain.whole"] = True
        return bytes(body)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()
        if message["type"] != "http.request":
            raise IntegrityError("upload.cut-short", "the body broke off", step=_STEP, fix="Send it again.")
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _check_header(request: Request, limit: int) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ProtocolError(
            "http.encoding", "a body with a Content-Encoding", step=_STEP, fix="Send it as it is, not compressed."
        )
    length = request.headers.get("content-length")
    if length is None:
        return
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise ProtocolError("http.bad-argument", "Content-Length is no number", step=_STEP, fix="Send a number.")
    if int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ProtocolError:
    return ProtocolError(
        "upload.too-large",
        f"a body of more than {limit} bytes",
        step=_STEP,
        fix="Ask about fewer records at a time, of the size that the package says.",
    )
