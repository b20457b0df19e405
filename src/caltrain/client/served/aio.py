"""A served model for programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from caltrain.client.served import exchange
from caltrain.client.served.exchange import PATIENCE, Call, Patience, Renew, Reply, Steps, Wait
from caltrain.client.served.handshake import Expectations
from caltrain.client.served.session import Opened, Prediction, Session
from caltrain.host_client import UNREACHABLE, check_plain, garbage, plain_http, unreachable
from caltrain.serving.package import Package

T = TypeVar("T")


class AsyncServedModel(Opened):
    """A verified enclave that answers. Tasks of one loop may share it. Made by `connect`, closed by `close`."""

    def __init__(self, http: httpx.AsyncClient, opening: Callable[[Package | None, Patience], Steps[Session]]) -> None:
        self._http, self._opening = http, opening
        self._renewing = asyncio.Lock()

    @classmethod
    async def connect(
        cls,
        url: str,
        model: str,
        expected: Expectations,
        *,
        version: str | None = None,
        clock: Callable[[], datetime],
        patience: float = PATIENCE,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> Self:
        """Like `ServedModel.connect`."""
        opening = partial(exchange.open_session, expected, model, version, clock)
        made = cls(httpx.AsyncClient(**plain_http(url), limits=exchange.LIMITS, transport=transport), opening)
        try:
            made._session = await made._run(opening(None, Patience(patience)))
        except BaseException:
            await made.close()
            raise
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(self, records: NDArray[np.generic], *, patience: float = PATIENCE) -> Prediction:
        """Like `ServedModel.predict`."""
        return await self._run(exchange.predict(self._session, records, Patience(patience)))

    async def ready(self) -> bool:
        """Whether the host says that the model is ready."""
        terms = self.package.terms
        return await self._run(exchange.is_ready(terms.name, terms.revision))

    async def _run(self, steps: Steps[T]) -> T:
        given: Any = None
        try:
            while True:
                given = await self._do(steps.send(given))
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        finally:
            steps.close()  # gives its lane back

    async def _do(self, step: Call | Wait | Renew) -> Reply | Session | None:
        match step:
            case Call():
                return await self._call(step)
            case Wait(seconds):
                await asyncio.sleep(seconds)
                return None
            case Renew(old, patience):
                async with self._renewing:
                    if self._session is old:  # else somebody else was faster
                        self._session = await self._run(self._opening(old.package, patience))
                    return self._session

    async def _call(self, call: Call) -> Reply:
        sent = self._http.stream(call.method, call.path, params=call.params, content=call.content, headers=call.headers)
        try:
            async with sent as response:
                check_plain(response)
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > call.limit:
                        raise garbage(f"more than {call.limit} bytes for {call.path}")
                return Reply(response.status_code, response.headers, bytes(body))
        except UNREACHABLE as error:
            raise unreachable(error) from error
