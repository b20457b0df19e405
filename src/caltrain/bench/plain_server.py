"""Plain PyTorch behind the serving host: the same HTTP server, protocol, queue and batches, and nothing protected."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from caltrain.boundary.messages import Attest
from caltrain.boundary.serving import CloseSession, Grant, LoadPackage, OpenSession, Served
from caltrain.crypto.aead import TAG_BYTES
from caltrain.exposure.subject import Subject
from caltrain.host.serving.faults import Outcome
from caltrain.serving.package import Package
from caltrain.serving.session import REQUEST_OVERHEAD
from caltrain.training.batches import center_crop, normalise

HEAD = REQUEST_OVERHEAD - TAG_BYTES


class PlainEnclave:
    """Takes the place of an enclave. A request is a sealed one's head, records in clear, nothing for the tag."""

    def __init__(self, subject: Subject, package: Package, *, threads: int) -> None:
        self._subject, self._package = subject, package
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="plain")
        self._worker.submit(torch.set_num_threads, threads).result()

    def ask(self, message: LoadPackage | Attest | Grant | OpenSession | CloseSession) -> Future[Served]:
        """A session is a name that is told in clear, and any envelope a key."""
        answer = Future[Served]()
        session = os.urandom(16).hex() if isinstance(message, OpenSession) else ""
        signed = message.envelope if isinstance(message, Grant) else None
        answer.set_result(Served(session=session, sealed=session.encode(), signed=signed))
        return answer

    def infer(self, requests: list[bytes]) -> Future[list[Outcome]]:
        """Probabilities for each request."""
        return self._worker.submit(self._compute, requests)

    def stop(self) -> None:
        """End the thread."""
        self._worker.shutdown()

    def _compute(self, requests: Sequence[bytes]) -> list[Outcome]:
        package = self._package
        kind = torch.uint8 if package.data.dtype == "u8" else torch.float32
        rows = [bytearray(request[HEAD:-TAG_BYTES]) for request in requests]
        records = [torch.frombuffer(raw, dtype=kind).view(-1, *package.data.shape) for raw in rows]
        parts = torch.split(self._predict(torch.cat(records)), [len(record) for record in records])
        return [part.numpy().tobytes() for part in parts]

    @torch.inference_mode()
    def _predict(self, records: Tensor) -> Tensor:
        package, count = self._package, len(records)
        if package.terms.batch.fixed:
            records = torch.cat(
                [records, records.new_zeros(package.terms.batch.rows - len(records), *records.shape[1:])]
            )
        x = normalise(center_crop(records, package.spec.size), package.data, channels_last=True)
        logits: Tensor = self._subject.module(x)
        return logits.softmax(1)[:count]


class PlainLaunch:
    """Starts the one plain "enclave" of a process."""

    def __init__(self, subject: Subject, package: Package, *, threads: int) -> None:
        self._enclave = PlainEnclave(subject, package, threads=threads)

    def __call__(self, on_lost: Callable[[], None]) -> PlainEnclave:
        """It never ends by itself."""
        del on_lost
        return self._enclave

    def close(self) -> None:
        """Nothing is held."""
