"""What an operator watches, as Prometheus text: counts, sizes and times; nothing of users, sessions or contents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from caltrain.errors import CaltrainError

CONTENT_TYPE = CONTENT_TYPE_LATEST
_OF_MODEL = ("model", "version")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter(
            "caltrain_requests", "Requests by outcome: ok, or an error's code.", (*_OF_MODEL, "outcome"), registry=own
        )
        self.batches = Histogram(
            "caltrain_batch_rows", "Records computed together.", _OF_MODEL, buckets=_ROWS, registry=own
        )
        self.seconds = Histogram(
            "caltrain_request_seconds", "From arrival to answer.", _OF_MODEL, buckets=_SECONDS, registry=own
        )
        self.restarts = Counter("caltrain_enclave_restarts", "Enclaves that ended unasked.", _OF_MODEL, registry=own)
        self.queue = Gauge("caltrain_queue_rows", "Records that wait.", _OF_MODEL, registry=own)
        self.sessions = Gauge("caltrain_sessions", "Open sessions.", _OF_MODEL, registry=own)
        self.ready = Gauge("caltrain_model_ready", "1 where a model takes requests.", _OF_MODEL, registry=own)

    def of(self, model: str, version: str) -> ModelMeters:
        """The figures of one version of a model."""
        return ModelMeters(self, model, version)

    def page(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)


class ModelMeters:
    """Figures of one version of a model."""

    def __init__(self, metrics: Metrics, model: str, version: str) -> None:
        self._metrics, self._names = metrics, (model, version)
        self._requests = metrics.requests
        self._outcomes: dict[str, Counter] = {}
        self._seconds, self._rows = metrics.seconds.labels(*self._names), metrics.batches.labels(*self._names)
        self._restarts = metrics.restarts.labels(*self._names)

    def watch(self, *, queue: Callable[[], float], sessions: Callable[[], float], ready: Callable[[], float]) -> None:
        """Where to look for what is read only when somebody asks."""
        for gauge, read in (
            (self._metrics.queue, queue),
            (self._metrics.sessions, sessions),
            (self._metrics.ready, ready),
        ):
            gauge.labels(*self._names).set_function(read)

    def forget(self) -> None:
        """The model is gone: what it counted stays, what it showed of itself goes."""
        for gauge in (self._metrics.queue, self._metrics.sessions, self._metrics.ready):
            gauge.remove(*self._names)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A request, from here to its end."""
        begun, outcome = time.perf_counter(), "ok"
        try:
            yield
        except CaltrainError as error:
            outcome = error.code
            raise
        except BaseException:
            outcome = "gone"
            raise
        finally:
            self._request(outcome, time.perf_counter() - begun)

    def _request(self, outcome: str, seconds: float) -> None:
        if (counter := self._outcomes.get(outcome)) is None:
            counter = self._outcomes[outcome] = self._requests.labels(*self._names, outcome)
        counter.inc()
        self._seconds.observe(seconds)

    def batch(self, rows: int) -> None:
        """So many records are computed together."""
        self._rows.observe(rows)

    def restarted(self) -> None:
        """The enclave ended, and nobody had asked it to."""
        self._restarts.inc()
