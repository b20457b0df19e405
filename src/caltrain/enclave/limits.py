"""How fast a user may ask: a bucket that holds `per_hour` inputs and fills again within an hour.

An enclave that takes a run up finds in the chain what was asked before and takes it off a full bucket, so a restart
gives nobody more than waiting would.
"""

from __future__ import annotations

import math

from caltrain.enclave.run import Bucket, Run
from caltrain.errors import AccessError
from caltrain.plan import User

_HOUR = 3600
_ROUNDING = 1e-9


def draw(run: Run, user: User, count: int) -> None:
    """Take `count` inputs out of a user's bucket. Raises AccessError `user.too-fast`; then nothing is taken."""
    if not user.per_hour:
        return
    first = Bucket(max(0, user.per_hour - run.spent.get(user.name, 0)), run.started)
    before, now = run.buckets.get(user.name, first), run.clock()
    # A clock that went back stands still for us: what was waited for once does not count again.
    at = max(now, before.at)
    level = min(user.per_hour, before.level + (at - before.at) * user.per_hour / _HOUR)
    missing = count - level - _ROUNDING
    if missing > 0:
        wait = math.ceil(missing * _HOUR / user.per_hour)
        never = count > user.per_hour
        raise AccessError(
            "user.too-fast",
            f"{user.name} may ask about {user.per_hour} inputs an hour, and asked about {count} now",
            step="query",
            fix=f"Ask about at most {user.per_hour} at a time." if never else f"Ask again in {wait} seconds.",
        )
    run.buckets[user.name] = Bucket(level - count, at)
