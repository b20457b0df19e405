"""The linkage store beside plain faiss: exact nearest neighbours inside one class, in turns, on the same rows.

    caltrain bench trace --records 10000000 --dims 256 --format json

Records are drawn: unit vectors around a direction of their class, scattered in all dimensions alike, which is the
least that a search by bounds can use. They are sealed into a store whose host is a folder behind a stream of its own,
one class is unsealed, and its rows, as stored, are given to the peers. A round asks each way for the 9 nearest of one
query.
"""

from __future__ import annotations

import importlib
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.accountability.planes import stored
from caltrain.accountability.segments import Batch, Source
from caltrain.bench.harness import Clock, Work, compare
from caltrain.boundary.channel import Channel
from caltrain.boundary.messages import STORAGE_CALLS
from caltrain.crypto.digests import digest
from caltrain.enclave.door import Door
from caltrain.enclave.linkage import LinkageStore
from caltrain.enclave.segments import Place
from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.host.launcher import serve_storage
from caltrain.host.store import Store

_K = 9
_SEGMENT = 1 << 18
_MODEL = digest("bench-model/v1")
_SOURCE: Source = ("drawn", "0" * 32)
_SHARDED = (True, True)  # a thread for each shard; numbers of rows go on from shard to shard
_EXACT = ("faiss flat", "faiss sharded")
Query = Callable[[Tensor], object]


class TraceReport(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one query of one class, warm. `peers_p50_ms` by way; ratios are a peer's time over ours.

    `ratio_to_faiss` is to the faster of flat and sharded: exact indexes of fp32 vectors. `best` is the fastest peer.
    """

    records: int
    dims: int
    classes: int
    class_records: int
    threads: int
    rounds: int
    p50_ms: float
    p95_ms: float
    recall_at_9: float
    faiss_flat_p50_ms: float
    peers_p50_ms: dict[str, float]
    ratio_to_faiss: float
    best: str
    ratio_to_best: float
    bytes_per_record: float
    build_seconds: float
    unseal_seconds: float


def run(
    *,
    records: int = 1_000_000,
    dims: int = 256,
    classes: int = 10,
    rounds: int = 25,
    judged: int = 10,
    threads: int = 2,
    clock: Clock = time.perf_counter,
    folder: Path | None = None,
) -> TraceReport:
    """Measure; recall is judged on `judged` queries against a scan in float64.

    `folder` is where the host keeps what is sealed (default: the system's place for temporary files). Raises
    ConfigError `bench.no-faiss`, `bench.bounds`, and what `harness.compare` raises.
    """
    faiss = _faiss()
    for name, value, most in (("records", records, 10**9), ("dims", dims, 4096), ("threads", threads, 256)):
        _check(name, value, most)
    _check("classes", classes, records // _K)  # a class must have nine
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=folder) as kept, _door(Path(kept)) as door:
        store, build_seconds = _built(door, records, dims, classes, clock)
        start = clock()
        label = 0
        store.load(_MODEL, [label])
        unseal_seconds = clock() - start
        rows = torch.cat([shelf.planes.rows() for shelf in store.shelves(_MODEL, [label])])
        queries = _drawn(np.full(max(rounds, judged) + 1, label), dims, seed=records)
        ways = {"store": _of_store(store, label)} | _peers(faiss, rows, threads)
        turns = {name: _in_turn(way, queries) for name, way in ways.items()}
        timings = {t.name: t for t in compare(turns, baseline="store", repeats=rounds, clock=clock)}
        recall = _recall(store, label, rows, queries[:judged])
        nbytes = store.nbytes(_MODEL) / len(rows)
    ours = timings.pop("store")
    peers = {name: 1000 * timing.seconds.median for name, timing in timings.items()}
    best = min(peers, key=peers.__getitem__)
    p50 = 1000 * ours.seconds.median
    return TraceReport(
        records=records,
        dims=dims,
        classes=classes,
        class_records=len(rows),
        threads=threads,
        rounds=rounds,
        p50_ms=p50,
        p95_ms=1000 * _quantile(ours.rounds, 0.95),
        recall_at_9=recall,
        faiss_flat_p50_ms=peers["faiss flat"],
        peers_p50_ms=peers,
        ratio_to_faiss=min(peers[name] for name in _EXACT) / p50,
        best=best,
        ratio_to_best=peers[best] / p50,
        bytes_per_record=nbytes,
        build_seconds=build_seconds,
        unseal_seconds=unseal_seconds,
    )


@contextmanager
def _door(folder: Path) -> Iterator[Door]:
    """A host that stores in `folder`, behind a stream, as the launcher's storage thread does."""
    store, (inside, outside) = Store(folder), socket.socketpair()

    def serve(channel: Channel) -> None:
        try:
            while True:
                channel.send(serve_storage(store, channel.receive(STORAGE_CALLS)))
        except EnvironmentFault:
            channel.close()  # the other end is done

    host = threading.Thread(target=serve, args=(Channel(outside),), daemon=True)
    host.start()
    ours = Channel(inside)
    try:
        yield Door(ours)
    finally:
        ours.close()
        host.join()


def _built(door: Door, records: int, dims: int, classes: int, clock: Clock) -> tuple[LinkageStore, float]:
    """A store of drawn records, and the seconds that it took to add them."""
    store, spent = LinkageStore.create(door, Place.fresh("0" * 32)), 0.0
    for first in range(0, records, _SEGMENT):
        leaves = np.arange(first, min(first + _SEGMENT, records))
        rows = stored(_drawn(leaves % classes, dims, seed=first))
        commitments = np.frombuffer(os.urandom(32 * len(rows)), np.uint8).reshape(-1, 32)
        source = np.zeros(len(rows), np.uint32)
        batch = Batch(rows, leaves % classes, [_SOURCE], source, leaves.astype(np.uint32), commitments)
        start = clock()
        store.append(batch, model=_MODEL, time=first)
        spent += clock() - start
    return store, spent


def _drawn(labels: NDArray[np.int64], dims: int, *, seed: int) -> Tensor:
    """Unit vectors (N, dims), float32: half a direction of the class, half scatter."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(int(labels.max()) + 1, dims, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(len(labels), dims, generator=draw)
    return torch.nn.functional.normalize(rows.add_(directions[torch.from_numpy(labels)]), dim=1)


def _of_store(store: LinkageStore, label: int) -> Query:
    return lambda query: store.nearest(query[None], model=_MODEL, labels=[label], k=_K)


def _peers(faiss: Any, rows: Tensor, threads: int) -> dict[str, Query]:
    """Ways to search the same rows, which they hold in fp32; `faiss fp16` keeps the 16 bits as they are stored."""
    whole, dims = rows.float().numpy(), rows.shape[1]
    flat, sharded = faiss.IndexFlatL2(dims), faiss.IndexShards(dims, *_SHARDED)
    parts = [faiss.IndexFlatL2(dims) for _ in range(threads)]
    for part, own in zip(parts, np.array_split(whole, threads), strict=True):
        part.add(own)
        sharded.add_shard(part)
    half = faiss.IndexScalarQuantizer(dims, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_L2)
    for index in (flat, half):
        index.add(whole)
    held, squares = torch.from_numpy(whole), torch.from_numpy(whole).square().sum(1)
    # A sharded index does not own its parts: they live as long as the function that asks it.
    return {
        "faiss flat": lambda query: flat.search(query[None].numpy(), _K),
        "faiss sharded": lambda query: (parts, sharded.search(query[None].numpy(), _K)),
        "faiss fp16": lambda query: half.search(query[None].numpy(), _K),
        "torch": lambda query: torch.topk(torch.addmv(squares, held, query, alpha=-2), _K, largest=False),
    }


def _in_turn(way: Query, queries: Tensor) -> Work:
    """The next query each time; every way gets the same ones in the same order."""
    turn = iter(queries)
    return lambda: way(next(turn))


def _recall(store: LinkageStore, label: int, rows: Tensor, queries: Tensor) -> float:
    """The share of the 9 nearest, by a scan in float64, that the store names."""
    leaf = np.concatenate([shelf.leaf for shelf in store.shelves(_MODEL, [label])])
    found = 0
    for query in queries:
        parts = [(part.double() - query.double()).square().sum(1) for part in torch.split(rows, 1 << 15)]
        true = leaf[torch.argsort(torch.cat(parts), stable=True)[:_K].numpy()]
        hits = store.nearest(query[None], model=_MODEL, labels=[label], k=_K)[0]
        found += len({hit.record.leaf for hit in hits} & set(true.tolist()))
    return found / (_K * len(queries))


def _quantile(values: tuple[float, ...], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise ConfigError(
            "bench.no-faiss",
            "faiss is not installed: there is nothing to compare with",
            step="bench trace",
            fix="Install caltrain with the extra: pip install 'caltrain[accountability]'.",
        ) from None


def _check(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ConfigError(
            "bench.bounds",
            f"a measurement cannot be made: {name} is {value}",
            step="bench trace",
            fix=f"Give 1 to {most}.",
        )
