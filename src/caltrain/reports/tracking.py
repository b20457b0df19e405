"""A run's log into the tools that people watch training with: a JSON lines file, TensorBoard, MLflow.

The host writes the log and could write anything: it is for watching. What counts is signed in the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from caltrain.errors import UNDECODABLE, ConfigError, ProtocolError
from caltrain.host_client import HeldOut, HostClient

MAX_LOG = 1 << 28


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the host's log: of a step, or (with no `step`) of an epoch that is over."""

    time: float
    epoch: int
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    held_out: HeldOut | None = None


class Sink(Protocol):
    """Takes figures at a step of the whole run."""

    def log(self, figures: dict[str, float], *, step: int, seconds: float) -> None:
        """Figures by name; `seconds` is Unix time by the host's clock."""


class Follower:
    """Hands every new line of a host's log to the sinks, once each."""

    def __init__(self, host: HostClient, sinks: Sequence[Sink]) -> None:
        self._host, self._sinks = host, sinks
        self._read = 0

    def follow(self) -> None:
        """Read what is new. A log that is not there yet is empty. Raises ProtocolError `log.malformed`."""
        if not self._sinks:
            return
        raw = self._host.tail("log.jsonl", offset=self._read, limit=MAX_LOG)
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._hand_on(_decode(line))

    def _hand_on(self, line: LogLine) -> None:
        steps = line.steps or 0
        step = line.epoch if line.step is None else (line.epoch - 1) * steps + line.step
        for sink in self._sinks:
            sink.log(_figures(line), step=step, seconds=line.time)


def _decode(raw: bytes) -> LogLine:
    try:
        return msgspec.json.decode(raw, type=LogLine)
    except UNDECODABLE as error:
        raise ProtocolError(
            "log.malformed", f"a line of the host's log: {error}", step="follow log", fix="Watch without its log."
        ) from None


def _figures(line: LogLine) -> dict[str, float]:
    """By the names that the tools group by: `step/...` over steps, `epoch/...` over epochs."""
    if line.step is not None:
        named = {"step/loss": line.loss, "step/images_per_second": line.images_per_second}
    else:
        held = line.held_out
        named = {"epoch/loss": line.loss}
        named |= {"held_out/loss": held.loss, "held_out/top1": held.top1, "held_out/top2": held.top2} if held else {}
    return {name: value for name, value in named.items() if value is not None}


class JsonLines:
    """Appends `{"step", "time", figures...}` lines to a file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file = stack.enter_context(path.open("ab"))

    def log(self, figures: dict[str, float], *, step: int, seconds: float) -> None:
        """One line."""
        self._file.write(msgspec.json.encode({"step": step, "time": seconds, **figures}) + b"\n")
        self._file.flush()


class TensorBoard:
    """Event files for TensorBoard, in a folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra

        self._writer = SummaryWriter(str(folder))
        stack.callback(self._writer.close)

    def log(self, figures: dict[str, float], *, step: int, seconds: float) -> None:
        """One scalar a figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)


class MLflow:
    """A run of an MLflow experiment, at a tracking address or in a folder."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        import mlflow  # noqa: PLC0415  # an extra

        mlflow.set_tracking_uri(address)
        mlflow.set_experiment("caltrain")
        stack.enter_context(mlflow.start_run())
        self._log = mlflow.log_metrics

    def log(self, figures: dict[str, float], *, step: int, seconds: float) -> None:
        """All figures of a step at once; MLflow gives them its own time."""
        del seconds
        self._log(figures, step=step)


@contextmanager
def open_sinks(
    *, jsonl: Path | None = None, tensorboard: Path | None = None, mlflow: str | None = None
) -> Iterator[list[Sink]]:
    """The sinks that were asked for. Raises ConfigError `tracking.not-installed`, `tracking.cannot-open`."""
    wanted: list[Callable[[ExitStack], Sink]] = []
    if jsonl is not None:
        wanted.append(lambda stack: JsonLines(jsonl, stack))
    if tensorboard is not None:
        wanted.append(lambda stack: TensorBoard(tensorboard, stack))
    if mlflow is not None:
        wanted.append(lambda stack: MLflow(mlflow, stack))
    with ExitStack() as stack:
        yield [_open(make, stack) for make in wanted]


def _open(make: Callable[[ExitStack], Sink], stack: ExitStack) -> Sink:
    try:
        return make(stack)
    except ImportError as error:
        raise ConfigError(
            "tracking.not-installed",
            f"{error.name or error} is not installed",
            step="open log",
            fix="pip install 'caltrain[tensorboard]' or 'caltrain[mlflow]'.",
        ) from None
    except Exception as error:  # noqa: BLE001  # the tools have errors of their own, without a common root
        what = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise ConfigError(
            "tracking.cannot-open", f"the log cannot be opened: {what}", step="open log", fix="Choose another place."
        ) from None
