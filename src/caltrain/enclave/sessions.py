"""Users' sessions with a serving enclave: their keys, which numbers of their lanes are used, what each user may still.

Budgets count records by the user's key for as long as the enclave lives: a session that ends takes none with it, and a
new one brings none.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from caltrain.errors import AccessError, ProtocolError
from caltrain.serving.package import ServedUser
from caltrain.serving.session import LANES, RequestHead, SessionKeys, read_head

MAX_SESSIONS = 4096
MAX_SESSIONS_OF_USER = 256
MAX_USERS_COUNTED = 1 << 16
"""Users are never forgotten, or their budgets would be whole again; an issuer could name any number. Whom the package
names has a place from the start."""
MAX_SESSION_REQUESTS = 1 << 32


@dataclass
class Session:
    """One user's keys; by lane the last number that was used."""

    id: str
    user: ServedUser
    keys: SessionKeys
    last: array[int] = field(default_factory=lambda: array("q", [-1] * LANES))
    requests: int = 0

    def open(self, frame: bytes, head: RequestHead) -> bytes:
        """The records of a request, once. Raises ProtocolError `request.replayed`, IntegrityError.

        Only an authentic frame moves its lane on: a forged one could else shut out all that come after.
        """
        if head.number <= self.last[head.lane]:
            raise ProtocolError(
                "request.replayed",
                "the session has seen this request, or a later one of its lane",
                step="open request",
                fix="Number the requests of a lane upwards, and send one only when the one before was answered.",
            )
        rows = self.keys.open_request(frame, head)
        self.last[head.lane] = head.number
        self.requests += 1
        return rows


class Sessions:
    """All sessions of one package. Whoever opens one too many pushes out the longest unused: their own, or of all.

    `named` are the keys of the users whom the package names itself.
    """

    def __init__(self, package: str, named: Iterable[str] = ()) -> None:
        self._package = package
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._spent = dict.fromkeys(named, 0)

    def open(self, user: ServedUser, key: bytes) -> Session:
        """A new session. Raises AccessError `user.too-many`."""
        if user.public_key not in self._spent and len(self._spent) >= MAX_USERS_COUNTED:
            raise AccessError(
                "user.too-many",
                f"{MAX_USERS_COUNTED} users have come already: the enclave counts no more",
                step="open session",
                fix="Ask the model's owner to have the package served anew.",
            )
        self._spent.setdefault(user.public_key, 0)
        own = [identity for identity, session in self._open.items() if session.user.public_key == user.public_key]
        if len(own) >= MAX_SESSIONS_OF_USER:
            self.close(own[0])
        elif len(self._open) >= MAX_SESSIONS:
            self._open.popitem(last=False)
        identity = os.urandom(16).hex()
        session = Session(identity, user, SessionKeys(key, package=self._package, session=identity))
        self._open[identity] = session
        return session

    def find(self, frame: bytes) -> tuple[Session, RequestHead]:
        """Whose request this claims to be. Raises ProtocolError `request.malformed`, `session.unknown`."""
        head = read_head(frame)
        session = self._open.get(head.session)
        if session is None or session.requests >= MAX_SESSION_REQUESTS:
            self.close(head.session)
            raise ProtocolError(
                "session.unknown",
                "the enclave has no such session: it was closed, or belonged to an enclave that is gone",
                step="find session",
                fix="Attest again and open a new session.",
            )
        return session, head

    def used(self, session: Session) -> None:
        """An authentic request came: of all sessions this one is dropped last."""
        if session.id in self._open:
            self._open.move_to_end(session.id)

    def close(self, identity: str) -> None:
        """Forget a session, if there is such a one."""
        self._open.pop(identity, None)

    def left(self, user: ServedUser) -> int:
        """How many records the user may still ask about."""
        return max(0, user.budget - self._spent.get(user.public_key, 0))

    def charge(self, user: ServedUser, rows: int) -> int:
        """Count records, and return what is left. Raises AccessError `user.budget-spent`; then nothing is counted."""
        left = self.left(user)
        if rows > left:
            raise AccessError(
                "user.budget-spent",
                f"{user.name} may ask about {left} more records, this request has {rows}",
                step="charge budget",
                fix="The model's owner decides how much a user may ask, each time that they hand over the key.",
            )
        self._spent[user.public_key] = self._spent.get(user.public_key, 0) + rows
        return left - rows
