"""Protected training beside plain PyTorch: speed, with the ratio's spread, and whether the weights are the same bits.

    caltrain bench train --format json

Each way has a process of its own (a protected run: two) and they take turns of a few steps, in alternating order, on
the same cores with the same threads, memory layout, prefetching, records and augmentation. A ratio is that of one
round: what slows the machine in a round slows all of it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from caltrain.bench.harness import Spread
from caltrain.bench.worker import Job, Peak, Way
from caltrain.errors import ConfigError, EnvironmentFault
from caltrain.models.layers import has_weights
from caltrain.models.spec import Partition, check_cut
from caltrain.presets import STARTS, Preset, StartName
from caltrain.training.spec import CenterSpec

WAYS: tuple[Way, ...] = ("plain", "two-way", "ternary")
_SETTLE = 0.2
OnRound = Callable[[int, int], None]


class TrainingReport(msgspec.Struct, frozen=True, kw_only=True):
    """One cut. Images a second are medians over the rounds; a ratio is protected over plain in the same round."""

    model: str
    cut: int
    head: int
    batch: int
    threads: int
    audit_rate: float
    rounds: int
    steps_a_round: int
    plain_images_per_s: float
    two_way_images_per_s: float
    ternary_images_per_s: float
    ratio_two_way: float
    ratio_ternary: float
    ratio_two_way_spread: Spread
    ratio_ternary_spread: Spread
    weights_identical: bool
    peak_rss_mb: dict[str, float]
    bytes_out_per_image: dict[str, float]
    bytes_in_per_image: dict[str, float]
    simulated: bool = True


def bench_preset(
    name: StartName, *, cut: int | None, head: int | None, batch: int | None, threads: int, audit_rate: float = 0.0
) -> Preset:
    """A preset with another cut, batch or number of threads. Raises ConfigError for what cannot be."""
    preset = STARTS[name]
    partition = Partition(
        front=preset.partition.front if cut is None else cut, head=preset.partition.head if head is None else head
    )
    training = msgspec.structs.replace(
        preset.training,
        batch=preset.training.batch if batch is None else batch,
        threads=threads,
        epochs=10_000,
        checkpoint_steps=0,
    )
    check_cut(preset.model, partition)
    center = CenterSpec(audit_rate=audit_rate)
    return msgspec.structs.replace(preset, partition=partition, training=training, center=center)


def cuts_of(preset: Preset) -> list[int]:
    """Every second cut of the model, as far as there is a CenterNet behind it."""
    spec, head = preset.model, preset.partition.head
    last = len(spec.layers) - head
    return [c for c in range(2, last, 2) if any(has_weights(layer) for layer in spec.layers[c:last])]


def run(
    name: StartName,
    preset: Preset,
    *,
    rounds: int,
    steps: int,
    identical: bool,
    on_round: OnRound = lambda _done, _of: None,
) -> TrainingReport:
    """Measure `rounds` rounds of `steps` steps each. Raises ConfigError `bench.bounds`, and what the ways raise."""
    if not (1 <= rounds <= 1000 and 1 <= steps <= 1000):
        raise ConfigError(
            "bench.bounds", f"{rounds} rounds of {steps} steps", step="bench train", fix="Ask for 1 to 1000 of each."
        )
    records = preset.training.batch * max(8, (rounds + 1) * steps + 2)
    workers = {way: Worker(way, preset, records) for way in WAYS}
    try:
        for way in WAYS:
            workers[way].ready()
        took = _rounds(workers, rounds, steps, on_round)
        peaks = {way: workers[way].finish() for way in WAYS}
    finally:
        for worker in workers.values():
            worker.kill()
    return _report(name, preset, took, peaks, steps, identical=identical)


def _rounds(workers: dict[Way, Worker], rounds: int, steps: int, on_round: OnRound) -> dict[Way, list[float]]:
    """Seconds of each way in each round, after one round that does not count."""
    took: dict[Way, list[float]] = {way: [] for way in WAYS}
    for turn in range(rounds + 1):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            time.sleep(_SETTLE)  # what the way before still prepares ahead is ready by then
            seconds = workers[way].go(steps)
            if turn:
                took[way].append(seconds)
        on_round(turn, rounds)
    return took


def _report(
    name: str,
    preset: Preset,
    took: dict[Way, list[float]],
    peaks: dict[Way, Peak],
    steps: int,
    *,
    identical: bool,
) -> TrainingReport:
    images = steps * preset.training.batch
    speed = {way: Spread.of([images / s for s in seconds]).median for way, seconds in took.items()}
    ratio = {way: _ratios(took["plain"], took[way]) for way in WAYS}
    return TrainingReport(
        model=name,
        cut=preset.partition.front,
        head=preset.partition.head,
        batch=preset.training.batch,
        threads=preset.training.threads,
        audit_rate=preset.center.audit_rate,
        rounds=len(took["plain"]),
        steps_a_round=steps,
        plain_images_per_s=round(speed["plain"], 2),
        two_way_images_per_s=round(speed["two-way"], 2),
        ternary_images_per_s=round(speed["ternary"], 2),
        ratio_two_way=round(ratio["two-way"].median, 4),
        ratio_ternary=round(ratio["ternary"].median, 4),
        ratio_two_way_spread=ratio["two-way"],
        ratio_ternary_spread=ratio["ternary"],
        weights_identical=identical,
        peak_rss_mb={way: round(peak.peak_rss_mb, 1) for way, peak in peaks.items()},
        bytes_out_per_image={way: peak.bytes_out_per_image for way, peak in peaks.items()},
        bytes_in_per_image={way: peak.bytes_in_per_image for way, peak in peaks.items()},
    )


def _ratios(plain: Sequence[float], own: Sequence[float]) -> Spread:
    return Spread.of([a / b for a, b in zip(plain, own, strict=True)])


class Worker:
    """One way in its process."""

    def __init__(self, way: Way, preset: Preset, records: int) -> None:
        command = [sys.executable, "-c", "from caltrain.bench.worker import main; main()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._way = way
        job = Job(way=way, preset=msgspec.json.encode(preset), records=records)
        self._tell(msgspec.json.encode(job))

    def ready(self) -> None:
        """Wait until it stands before its first step."""
        self._answer("ready")

    def go(self, steps: int) -> float:
        """Seconds of so many steps."""
        self._tell(str(steps).encode())
        return float(self._answer("seconds"))

    def finish(self) -> Peak:
        """No more steps: its memory and traffic."""
        self._tell(b"")
        return msgspec.convert(self._read(), Peak)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _tell(self, line: bytes) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _answer(self, key: str) -> Any:
        return self._read()[key]

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else b""
        if not line:
            raise EnvironmentFault(
                "bench.worker-died",
                f"the {self._way} way ended (exit status {self._process.wait()})",
                step="bench train",
                fix="Read what it wrote to standard error.",
            )
        answer: dict[str, Any] = msgspec.json.decode(line)
        return answer
