"""One entry of the grid, done in a process of its own: what was kept of it is taken, the rest is made and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import msgspec
import torch

import caltrain
from caltrain.bench.accountability.cache import Cache, Plain
from caltrain.bench.accountability.making import MODELS, Made, make, outlook_of
from caltrain.bench.accountability.ours import Ours
from caltrain.bench.accountability.peers import peers
from caltrain.bench.accountability.planting import case
from caltrain.bench.accountability.questions import Method, Tally, judged
from caltrain.bench.accountability.remedy import Repair, repaired
from caltrain.bench.accountability.scene import Pool, draw

OURS = "caltrain"
_HERE = "bench/accountability"
_OURS = ("accountability", f"{_HERE}/ours.py", f"{_HERE}/questions.py")
_PEERS = (
    "accountability/neighbours.py",
    "accountability/attribution.py",
    *(f"{_HERE}/{name}.py" for name in ("peer", "clusters", "doubters", "attribution", "questions")),
)


class Where(msgspec.Struct, frozen=True):
    """Which data, from where, and where results are kept."""

    data: str
    data_dir: str | None
    records: int | None
    cache: str
    download: bool = False
    skew: float | None = None


class Job(msgspec.Struct, frozen=True):
    """One case at one seed."""

    name: str
    share: float | None
    seed: int


class Done(msgspec.Struct, frozen=True):
    """What came of it, by method."""

    job: Job
    accuracy: float
    success: float | None
    tallies: dict[str, Tally]


def prepare(where: Where, seed: int) -> None:
    """What all label noise of a seed needs, so that two processes do not both make it."""
    pool, cache = _pool(where, seed), Cache(Path(where.cache))
    outlook_of(pool, cache, seed=seed)


def perform(where: Where, job: Job) -> Done:
    """Make the run, ask every method about it."""
    made, cache = _made(where, job), Cache(Path(where.cache))
    about = _about(made, job)
    methods: dict[str, Callable[[], Method]] = {OURS: lambda: Ours(made, seed=job.seed)}
    methods |= {name: _waiting(maker, made, job.seed) for name, maker in peers().items()}
    tallies = {
        name: _tally(cache, {**about, "method": name, "code": sources(_OURS if name == OURS else _PEERS)}, maker, made)
        for name, maker in methods.items()
    }
    return Done(job, made.accuracy, made.success, tallies)


def repair(where: Where, job: Job) -> Repair | None:
    """Make the run, and two more: without the verdict's records, and without the poison. None without a verdict."""
    made, cache = _made(where, job), Cache(Path(where.cache))
    return repaired(made, Ours(made, seed=job.seed), cache, _about(made, job), seed=job.seed)


def sources(parts: Iterable[str]) -> str:
    """SHA-256 over source files of the package, given by file or folder: a change of them changes what is kept."""
    root = Path(caltrain.__file__).parent
    found = hashlib.sha256()
    for part in parts:
        for path in sorted((root / part).glob("*.py")) if (root / part).is_dir() else [root / part]:
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _tally(cache: Cache, of: dict[str, Plain], maker: Callable[[], Method], made: Made) -> Tally:
    kept = cache.get(of)
    if kept is None:
        tally = judged(maker(), made)
        cache.put(of, {}, msgspec.to_builtins(tally))
        return tally
    return msgspec.convert(kept.figures, Tally)


def _waiting(maker: Callable[..., Method], made: Made, seed: int) -> Callable[[], Method]:
    return lambda: maker(made, seed=seed)


def _made(where: Where, job: Job) -> Made:
    torch.set_num_threads(1)
    pool = _pool(where, job.seed)
    return make(pool, case(job.name, job.share), seed=job.seed, cache=Cache(Path(where.cache)), skew=where.skew)


def _about(made: Made, job: Job) -> dict[str, Plain]:
    scene = made.scene
    return {
        **{"kind": "tally", "models": MODELS, "pool": scene.pool.digest(), "planted": scene.digest()},
        **{"case": job.name, "share": job.share, "seed": job.seed},
    }


@lru_cache(maxsize=1)
def _pool(where: Where, seed: int) -> Pool:
    data_dir = Path(where.data_dir) if where.data_dir else None
    return draw(where.data, data_dir=data_dir, seed=seed, records=where.records, download=where.download)
