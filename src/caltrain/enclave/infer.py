"""Batches of a serving enclave: requests are opened and counted, computed together, answered each to its own user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from caltrain.boundary.serving import MAX_BATCHES, Admitted, Answered
from caltrain.boundary.tensors import TensorHead
from caltrain.enclave.served_model import LARGEST, ServedModel, is_below
from caltrain.enclave.sessions import Session, Sessions
from caltrain.errors import CaltrainError, DataError, IntegrityError, ProtocolError
from caltrain.serving.package import Package
from caltrain.serving.session import Answer, RequestHead

Refused = dict[int, dict[str, str]]


@dataclass(frozen=True)
class Request:
    """An admitted request: its session (which may be closed before the answer), its records, what its user has left."""

    session: Session
    head: RequestHead
    records: Tensor
    left: int


@dataclass(frozen=True)
class Batch:
    """Admitted requests by place, and the IR as it was sent, where it may be audited."""

    requests: Mapping[int, Request]
    sent: Sequence[Tensor]


class Batches:
    """Those under way, at most `MAX_BATCHES`. `draw` gives numbers in [0, 1) that nobody can tell before."""

    def __init__(self, package: Package, model: ServedModel, sessions: Sessions, *, draw: Callable[[], float]) -> None:
        self._package, self._model, self._sessions, self._draw = package, model, sessions, draw
        self._open: dict[int, Batch] = {}
        self._wrong = 0

    def begin(self, number: int, frames: Sequence[bytes]) -> tuple[Admitted, list[Tensor]]:
        """Admit requests, each for itself; the IR of those that were, if any.

        Raises ProtocolError `serving.too-many-batches`, `serving.batch-known`; then no request was looked at.
        """
        if len(self._open) >= MAX_BATCHES:
            raise _disorder("serving.too-many-batches", f"{MAX_BATCHES} batches are under way, and no more may be")
        if number in self._open:
            raise _disorder("serving.batch-known", f"batch {number} is under way already")
        requests, refused = self._admit(frames)
        live, requests = self._first_part(requests, refused)
        if not requests:
            return Admitted(number, refused), []
        sent = self._model.send(live)
        self._open[number] = Batch(requests, sent if self._package.terms.audit else ())
        return Admitted(number, refused, sum(len(request.records) for request in requests.values())), sent

    def finish(self, head: TensorHead, tensors: Sequence[Tensor]) -> Answered:
        """Answers from what the center gave for a batch, which is then forgotten, whatever comes of it.

        Raises IntegrityError `center.malformed`, `center.wrong`.
        """
        batch = self._open.pop(head.step, None)
        if batch is None or (head.role, head.run, head.epoch) != ("center-out", self._package.id, 0):
            raise _malformed("it is of no batch that is under way")
        live = self._checked(batch, tensors)
        # Drawn now: the center cannot have known, when it computed, whether anybody would compare.
        audited = self._draw() < self._package.terms.audit
        if audited and not self._model.is_right(batch.sent, live):
            self._wrong += 1
            raise IntegrityError(
                "center.wrong",
                "the host's center gave another output than the model's",
                step="audit center",
                fix="Stop trusting this host, or look for what makes its center compute something else.",
            )
        chances = self._model.finish(live)
        if not is_below(float("inf"), [chances]):
            raise _malformed("with it the scores are no numbers")
        return Answered(head.step, _answers(batch, chances, audited=audited, wrong=self._wrong))

    def abandon(self, number: int) -> Answered:
        """Forget a batch, whose budget stays spent: the center has its IR. Raises ProtocolError `serving.no-batch`."""
        if self._open.pop(number, None) is None:
            raise _disorder("serving.no-batch", f"no batch {number} is under way")
        return Answered(number)

    def _admit(self, frames: Sequence[bytes]) -> tuple[dict[int, Request], Refused]:
        requests: dict[int, Request] = {}
        refused: Refused = {}
        room = self._package.terms.batch.rows
        for place, frame in enumerate(frames):
            try:
                requests[place] = self._open_request(frame, room)
                room -= len(requests[place].records)
            except CaltrainError as error:
                refused[place] = error.diagnostics()
        return requests, refused

    def _open_request(self, frame: bytes, room: int) -> Request:
        """One request, in this order: whose it is, whether it is new and authentic, its size, the budget.

        The budget is not given back if the center then fails: the host has seen the IR, and every pair of a known input
        and its IR teaches it something of the FrontNet. That is what budgets are for.
        """
        session, head = self._sessions.find(frame)
        raw = session.open(frame, head)
        self._sessions.used(session)
        records = _records(self._package, raw)
        if len(records) > room:
            raise _disorder("serving.batch-full", f"{len(records)} records where the batch has room for {room} more")
        return Request(session, head, records, self._sessions.charge(session.user, len(records)))

    def _first_part(
        self, requests: dict[int, Request], refused: Refused
    ) -> tuple[tuple[Tensor, ...], dict[int, Request]]:
        """The FrontNet's output; requests with which it overflows are refused, and the others computed without them."""
        if not requests:
            return (), requests
        live = self._model.begin(self._together(requests))
        if is_below(LARGEST, live):
            return live, requests
        alone = _by_place(requests, live)
        fitting = {place: r for place, r in requests.items() if is_below(LARGEST, alone[place])}
        for place in requests.keys() - fitting.keys():
            refused[place] = _unfit("the model's values for a record are beyond all bounds").diagnostics()
        if len(fitting) == len(requests):  # none is too large alone
            return live, requests
        return self._first_part(fitting, refused)

    def _together(self, requests: Mapping[int, Request]) -> Tensor:
        records = [request.records for request in requests.values()]
        batch = self._package.terms.batch
        missing = batch.rows - sum(map(len, records)) if batch.fixed else 0
        return torch.cat([*records, records[0].new_zeros(missing, *self._package.data.shape)])

    def _checked(self, batch: Batch, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The center's output as float32, if it has the form that is due and is finite."""
        rows = sum(len(request.records) for request in batch.requests.values())
        rows = self._package.terms.batch.rows if self._package.terms.batch.fixed else rows
        try:
            live = self._model.receive(tensors)
        except ProtocolError as error:
            raise _malformed(error.what) from None
        if [tuple(x.shape) for x in live] != [(rows, *shape) for shape in self._model.due]:
            raise _malformed(f"{[tuple(x.shape) for x in live]} for {rows} records")
        if not is_below(float("inf"), live):
            raise _malformed("it is not finite")
        return live


def _records(package: Package, raw: bytes) -> Tensor:
    rows, rest = divmod(len(raw), package.row_bytes)
    if rest or not 1 <= rows <= package.terms.batch.rows:
        raise _unfit(f"{len(raw)} bytes where a record has {package.row_bytes}, at most {package.terms.batch.rows}")
    array = np.frombuffer(raw, package.data.numpy_dtype).reshape(rows, *package.data.shape)
    if (
        package.data.dtype == "f32"  # equivalent: bytes are always finite; this saves a pass over them
        and not np.isfinite(array).all()
    ):
        raise _unfit("a record holds NaN or infinity")
    return torch.from_numpy(array.copy())


def _by_place(requests: Mapping[int, Request], live: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """The rows of each request."""
    parts, start = {}, 0
    for place, request in requests.items():
        stop = start + len(request.records)
        parts[place], start = [x[start:stop] for x in live], stop
    return parts


def _answers(batch: Batch, chances: Tensor, *, audited: bool, wrong: int) -> dict[int, bytes]:
    """By place, each sealed under the key of the session that asked."""
    sealed = {}
    for place, (mine,) in _by_place(batch.requests, [chances]).items():
        request, raw = batch.requests[place], mine.contiguous().numpy().astype("<f4").tobytes()
        sealed[place] = request.session.keys.seal_answer(request.head, Answer(audited, wrong, request.left, raw))
    return sealed


def _unfit(what: str) -> DataError:
    return DataError(
        "request.rows",
        f"a request was refused: {what}",
        step="open request",
        fix="Send whole, finite records of the model's schema, at most as many as one batch has.",
    )


def _disorder(code: str, what: str) -> ProtocolError:
    return ProtocolError(code, what, step="infer", fix="The host has to form batches as the package says.")


def _malformed(what: str) -> IntegrityError:
    return IntegrityError(
        "center.malformed",
        f"the host's center gave an output that cannot be one: {what}",
        step="receive center output",
        fix="Ask again; if it repeats, the host's center is broken, or the host misbehaves.",
    )
