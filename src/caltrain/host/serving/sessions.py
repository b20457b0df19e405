"""The open sessions of one enclave, as the host sees them: ids, whose key opened them, what is under way.

A key is as its user signed with it, once the enclave has taken the session: no user can take all sessions, or the whole
queue, from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from caltrain.host.serving.faults import session_busy, session_unknown

MOST = 4096
MOST_OF_USER = 256
MOST_UNDER_WAY = 64
IDLE_SECONDS = 3600.0


@dataclass
class _Session:
    user: str
    used: float
    under_way: int = 0


class Sessions:
    """At most 4096 of one enclave. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[str, _Session] = {}
        self._rows: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, session: str) -> bool:
        return session in self._open

    def opened(self, session: str, user: str) -> list[str]:
        """Note a new session. Returns those to close: idle for an hour, or, of too many, idle for longest."""
        now = self._clock()
        own = [name for name, held in self._open.items() if held.user == user and not held.under_way]
        self._open[session] = _Session(user, now)
        if sum(held.user == user for held in self._open.values()) > MOST_OF_USER and own:
            del self._open[own[0]]
            return own[:1]
        surplus = len(self._open) - MOST
        closed: list[str] = []
        for name, held in self._open.items():  # the longest unused come first
            if name == session or not (len(closed) < surplus or now - held.used > IDLE_SECONDS):
                break
            if not held.under_way:
                closed.append(name)
        for name in closed:
            del self._open[name]
        return closed

    def forget(self, session: str | None = None) -> None:
        """One session is no longer open, or none is."""
        if session is None:
            self._open.clear()
        else:
            self._open.pop(session, None)

    @contextmanager
    def request(self, session: str, rows: int, *, most_rows: int) -> Iterator[None]:
        """A request of so many records under way; its user may have `most_rows` on their way in all.

        Raises ProtocolError `session.unknown`, AccessError `session.busy`.
        """
        held = self._open.get(session)
        if held is None:
            raise session_unknown()
        if held.under_way >= MOST_UNDER_WAY:
            raise session_busy(f"{MOST_UNDER_WAY} requests of this session are under way")
        if self._rows[held.user] + rows > most_rows:
            raise session_busy(f"{self._rows[held.user]} records of this user are under way")
        held.under_way += 1
        self._rows[held.user] += rows
        try:
            yield
        finally:
            held.under_way -= 1
            self._rows[held.user] -= rows
            if not self._rows[held.user]:
                del self._rows[held.user]
            held.used = self._clock()
            if self._open.get(session) is held:
                self._open[session] = self._open.pop(session)

    @property
    def last_used(self) -> float:
        """When a session was used last: now, if something is under way; long ago if there is none."""
        if any(held.under_way for held in self._open.values()):
            return self._clock()
        return max((held.used for held in self._open.values()), default=float("-inf"))
