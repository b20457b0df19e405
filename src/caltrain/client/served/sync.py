"""A served model for programs with threads."""

from __future__ import annotations

import threading
import time
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


class ServedModel(Opened):
    """A verified enclave that answers. Threads may share it. Made by `connect`; close it, or use it in a `with`."""

    def __init__(self, http: httpx.Client, opening: Callable[[Package | None, Patience], Steps[Session]]) -> None:
        self._http, self._opening = http, opening
        self._renewing = threading.Lock()

    @classmethod
    def connect(
        cls,
        url: str,
        model: str,
        expected: Expectations,
        *,
        version: str | None = None,
        clock: Callable[[], datetime],
        patience: float = PATIENCE,
        transport: httpx.BaseTransport | None = None,
    ) -> Self:
        """Verify package and enclave, open a session. `transport` is for tests; `patience` in seconds, at most 60.

        Raises what `Handshake.check` does, EnvironmentFault `host.unreachable`, ProtocolError `host.garbage`, and what
        the host reports.
        """
        opening = partial(exchange.open_session, expected, model, version, clock)
        made = cls(httpx.Client(**plain_http(url), limits=exchange.LIMITS, transport=transport), opening)
        try:
            made._session = made._run(opening(None, Patience(patience)))
        except BaseException:
            made.close()
            raise
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, records: NDArray[np.generic], *, patience: float = PATIENCE) -> Prediction:
        """Ask about records (N, C, H, W), for at most `patience` seconds of waiting for a busy host.

        Raises DataError `ask.shape`, `ask.not-finite` before anything is sealed, AccessError `user.budget-spent`,
        and for a host that cheats IntegrityError, ProtocolError or AttestationError.
        """
        return self._run(exchange.predict(self._session, records, Patience(patience)))

    def ready(self) -> bool:
        """Whether the host says that the model is ready."""
        terms = self.package.terms
        return self._run(exchange.is_ready(terms.name, terms.revision))

    def _run(self, steps: Steps[T]) -> T:
        given: Any = None
        try:
            while True:
                given = self._do(steps.send(given))
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        finally:
            steps.close()  # gives its lane back

    def _do(self, step: Call | Wait | Renew) -> Reply | Session | None:
        match step:
            case Call():
                return self._call(step)
            case Wait(seconds):
                time.sleep(seconds)
                return None
            case Renew(old, patience):
                with self._renewing:
                    if self._session is old:  # else somebody else was faster
                        self._session = self._run(self._opening(old.package, patience))
                    return self._session

    def _call(self, call: Call) -> Reply:
        sent = self._http.stream(call.method, call.path, params=call.params, content=call.content, headers=call.headers)
        try:
            with sent as response:
                check_plain(response)
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > call.limit:
                        raise garbage(f"more than {call.limit} bytes for {call.path}")
                return Reply(response.status_code, response.headers, bytes(body))
        except UNREACHABLE as error:
            raise unreachable(error) from error
