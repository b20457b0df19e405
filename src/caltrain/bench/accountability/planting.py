"""Cases by name: what is planted in a pool of honest records. Numpy only, and drawn by a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from caltrain.bench.accountability import noise
from caltrain.bench.accountability.attacks import ATTACKS
from caltrain.bench.accountability.noise import NOISES, Outlook
from caltrain.bench.accountability.scene import PARTIES, Pool, Scene, fresh
from caltrain.errors import ConfigError

CLEAN, TROJAN, HOST = "clean", "trojan", "host"
BACKDOORS = (*ATTACKS, TROJAN, HOST)
CASES = (CLEAN, *BACKDOORS, *NOISES)
SHARES = (0.001, 0.01, 0.05)
MAX_SHARE = 0.1  # a fifth of the records of two contributors of four is where a majority of a class may be poison


class Case(NamedTuple):
    """A case by name, and the share of all records that is tampered with.

    Without a share, label noise has the stated rates of each contributor (`noise.RATES`); a clean run, and a host that
    plants a backdoor behind which no record stands, have no share.
    """

    name: str
    share: float | None

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name} {100 * self.share:g}%"


def case(name: str, share: float | None) -> Case:
    """A case that there is, with a share where it needs one. Raises ConfigError `bench.unknown-case`, `bench.share`."""
    if name not in CASES:
        raise _refuse("bench.unknown-case", f"there is no case {name!r:.40}", f"Choose of {', '.join(CASES)}.")
    if name in (CLEAN, HOST):
        return Case(name, None)
    if share is None and name in NOISES:
        return Case(name, None)
    if share is None or not 0 < share <= MAX_SHARE:
        raise _refuse("bench.share", f"{name} at a share of {share}", f"Give more than 0 and at most {MAX_SHARE}.")
    return Case(name, share)


def plant(
    pool: Pool,
    what: Case,
    *,
    seed: int,
    outlook: Callable[[], Outlook],
    parties: int = PARTIES,
    skew: float | None = None,
    rates: Sequence[float] = noise.RATES,
) -> Scene:
    """The scene of a case; `outlook` is asked only where label noise is planted.

    A trojan is not planted here but later, when there is a model to optimise it against (`making`).
    """
    rng = np.random.default_rng(seed)
    scene = fresh(pool, rng=rng, parties=parties, skew=skew)
    if what.name in NOISES:
        kind, given = NOISES[what.name], outlook()
        if what.share is None:
            noise.spoil(scene, kind, given, rng, rates=rates)
        else:
            noise.spoil_share(scene, kind, given, rng, what.share)
    elif what.name in ATTACKS and what.share is not None:
        ATTACKS[what.name](scene, what.share, rng)
    return scene


def _refuse(code: str, what: str, fix: str) -> ConfigError:
    return ConfigError(code, what, step="bench accountability", fix=fix)
