"""Connections that send no whole request head are ended: nobody holds the server's places by silence."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_SECONDS = 20.0


class PatientProtocol(H11Protocol):
    """uvicorn's own, which ends idle connections between requests, but waits for ever for the rest of a head."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A head is due from now on."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """With its first byte the next head is due; once it is whole, its body has a time-out of its own."""
        self._expect_head()
        super().data_received(data)
        if not self._waits_for_head:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is due."""
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _waits_for_head(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever its type says
        return cycle is None or cycle.response_complete

    def _expect_head(self) -> None:
        if self._timer is None and self._waits_for_head:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._end)

    def _end(self) -> None:
        self._timer = None
        if self._waits_for_head:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
