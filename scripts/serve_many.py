"""A load on a served model whose enclave is killed while it works.

    python scripts/serve_many.py [--model mnist] [--requests 50000] [--clients 64] [--kills 3]

A real host, its enclave, and the model's owner, who hands over the key again after each restart. Clients ask about one
record at a time out of a few hundred whose answers are known: batches have one size (`fixed`), so an answer is right or
wrong bit for bit. Every question must be answered once and rightly; what was told to come again, and by which error, is
counted on the way. Printed at the end: that, and the memory of host and enclave along the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import torch

from caltrain.bench.contest import contest, subject_for
from caltrain.bench.serving_pair import CLIENTS_A_SESSION, USER, Contest, grant_key, serving
from caltrain.client.served import AsyncServedModel, Expectations
from caltrain.exposure.subject import Subject
from caltrain.serving.package import BatchSpec
from caltrain.training.batches import center_crop, normalise

RECORDS = 512
ROWS = 32
PATIENCE = 120.0


class Counting(httpx.AsyncHTTPTransport):
    """Counts the host's refusals by their code."""

    def __init__(self, refused: Counter[str]) -> None:
        super().__init__(limits=httpx.Limits(max_connections=None))
        self._refused = refused

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if response.status_code != 200:
            body = await response.aread()
            self._refused[json.loads(body)["detail"]["code"]] += 1
        return response


def expected(
    subject: Subject, records: np.ndarray[tuple[int, ...], np.dtype[np.generic]], *, threads: int
) -> list[bytes]:
    """The model's own answers, in batches of the size that the host computes."""
    torch.set_num_threads(threads)
    found: list[bytes] = []
    with torch.inference_mode():
        for part in torch.split(torch.from_numpy(records), ROWS):
            x = normalise(center_crop(part, subject.spec.size), subject.data, channels_last=True)
            found += [row.numpy().tobytes() for row in subject.module(x).softmax(1)]
    return found


def enclave_of(host: int) -> int | None:
    """The process that runs the enclave program below the host's, innermost."""
    parents: dict[int, int] = {}
    programs: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid = int(stat.parent.name)
            parents[pid] = int(stat.read_text().rpartition(")")[2].split()[1])
            if b"caltrain.enclave" in (stat.parent / "cmdline").read_bytes():
                programs.add(pid)
        except OSError:
            continue
    below = {host}
    while grown := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= grown
    return max(programs & below, default=None)


def rss_mb(pid: int | None) -> float:
    """Resident memory."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024


class Owner(threading.Thread):
    """Hands over the key whenever the host says that the enclave waits for it."""

    def __init__(self, pair: Contest, url: str) -> None:
        super().__init__(daemon=True)
        self._pair, self._url, self.granted = pair, url, 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                ready = httpx.get(f"{self._url}/v2/models/bench/ready", trust_env=False)
                if ready.status_code == 503 and ready.json()["detail"]["code"] == "serving.no-key":
                    grant_key(self._pair, self._url)
                    self.granted += 1
            except Exception as error:  # noqa: BLE001  # killed between two steps: it is tried again
                print(f"owner: {error}", flush=True)
            self.stop.wait(0.2)


async def load(
    pair: Contest,
    url: str,
    records: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    right: list[bytes],
    *,
    requests: int,
    clients: int,
    at: dict[int, Callable[[], None]],
) -> tuple[Counter[str], Counter[str]]:
    """Outcomes of the questions, and the refusals on the way. `at` is called when so many were answered."""
    outcomes, refused = Counter[str](), Counter[str]()
    expectations = Expectations(owner=pair.owner.public, policy=pair.policy(), user=USER, signer=pair.user)
    sessions = [
        await AsyncServedModel.connect(
            url, "bench", expectations, clock=lambda: datetime.now(UTC), patience=PATIENCE, transport=Counting(refused)
        )
        for _ in range(-(-clients // CLIENTS_A_SESSION))
    ]
    left = iter(range(requests))

    async def client(number: int) -> None:
        for index in left:
            which = index % RECORDS
            answer = await sessions[number // CLIENTS_A_SESSION].predict(records[which : which + 1], patience=PATIENCE)
            same = answer.probabilities.tobytes() == right[which]
            outcomes["right" if same else "WRONG"] += 1
            if (then := at.get(outcomes.total())) is not None:
                then()

    results = await asyncio.gather(*(client(number) for number in range(clients)), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            outcomes[f"failed: {result}"] += 1
    for session in sessions:
        await session.close()
    return outcomes, refused


def main() -> int:
    """Run it, print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--cut", type=int, default=3)
    parser.add_argument("--head", type=int, default=1)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    subject = subject_for(asked.model)
    drawn = np.random.default_rng(0).integers(0, 256, (RECORDS, *subject.data.shape)).astype(np.uint8)
    right = expected(subject, drawn, threads=asked.threads)
    made = contest(
        subject,
        name=asked.model,
        front=asked.cut,
        head=asked.head,
        mapped=False,
        batch=BatchSpec(rows=ROWS, fixed=True),
        across="f32",
        threads=asked.threads,
    )
    with made as pair, serving(pair, "protected") as server:
        grant_key(pair, server.url)
        owner = Owner(pair, server.url)
        owner.start()
        host, began = server.process.pid, time.monotonic()

        def kill() -> None:
            if (enclave := enclave_of(host)) is not None:
                os.kill(enclave, signal.SIGKILL)
                print(f"killed the enclave ({enclave}) after {time.monotonic() - began:.0f} s", flush=True)

        def look() -> None:
            memory = f"host {rss_mb(host):.0f} MB, enclave {rss_mb(enclave_of(host)):.0f} MB"
            print(f"{time.monotonic() - began:5.0f} s: {memory}", flush=True)

        step = asked.requests // (asked.kills + 1)
        at: dict[int, Callable[[], None]] = dict.fromkeys(range(step // 4, asked.requests + 1, step // 4), look)
        at |= dict.fromkeys([step * (number + 1) for number in range(asked.kills)], kill)
        outcomes, refused = asyncio.run(
            load(pair, server.url, drawn, right, requests=asked.requests, clients=asked.clients, at=at)
        )
        seconds = time.monotonic() - began
        owner.stop.set()
    print(f"{asked.requests} questions from {asked.clients} clients in {seconds:.0f} s")
    print(f"the owner handed over the key {1 + owner.granted} times")
    print(f"answers: {dict(outcomes)}")
    print(f"told to come again: {dict(refused)}")
    return 0 if outcomes == Counter({"right": asked.requests}) else 1


if __name__ == "__main__":
    raise SystemExit(main())
