"""The center's audit: short runs of its steps, repeated inside bit for bit (DESIGN: the protocol, 9).

The host commits to its CenterNet's state at the ends of every short run; whether that run is repeated is drawn after
the commitment, so nothing can tell before. What crossed in it the enclave keeps itself until then: there is no digest
of the host's to believe. Any one falsified tensor, or falsified change of state, is found with the probability with
which its run is drawn; once is enough, because a run with a finding stops for good.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from caltrain.boundary.channel import Tensors
from caltrain.crypto.digests import same, to_raw
from caltrain.errors import IntegrityError
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import model_digest
from caltrain.training.zone import At, Zone


@dataclass(frozen=True)
class Crossing:
    """Everything that crossed in one step. Two-way: labels out, loss in; ternary: `out` in, its gradient out."""

    at: At
    ir: Tensors
    ir_grad: Tensors
    out: Tensors = ()
    out_grad: Tensors = ()
    labels: Tensor | None = None
    loss: float = 0.0


@dataclass
class Audit:
    """How often short runs are repeated, what crossed in the present one, and how many were."""

    rate: float
    length: int
    draw: Callable[[], float] = secrets.SystemRandom().random
    runs: int = 0
    audited: int = 0
    crossed: list[Crossing] = field(default_factory=list)

    def note(self, crossing: Crossing) -> None:
        """One step is over."""
        if self.rate:
            self.crossed.append(crossing)

    def end(self) -> Sequence[Crossing]:
        """The host has committed to the end of a short run: its steps if it is to be repeated, else nothing."""
        crossed, self.crossed = self.crossed, []
        chosen = self.draw() < self.rate
        self.runs += 1
        self.audited += chosen
        return crossed if chosen else ()


def repeat(zone: Zone, crossed: Sequence[Crossing]) -> None:
    """Repeat steps of the CenterNet from its committed state. Raises IntegrityError `audit.other-result`."""
    for step in crossed:
        out = zone.forward(step.ir, at=step.at, needs_input_grad=True)
        if step.labels is None:
            _compare(out, step.out, step.at, "its output")
            grads = zone.backward(step.out_grad, at=step.at)
        else:
            grads, loss = zone.backward_from_labels(step.labels, at=step.at)
            _compare([torch.tensor(loss)], [torch.tensor(step.loss)], step.at, "its loss")
        _compare(grads, step.ir_grad, step.at, "its gradient")


def _compare(own: Sequence[Tensor], theirs: Sequence[Tensor], at: At, what: str) -> None:
    if len(own) != len(theirs):
        raise caught("audit.other-result", f"in epoch {at.epoch}, step {at.step}, {what} was {len(theirs)} tensors")
    for mine, came in zip(own, theirs, strict=True):
        if not torch.equal(mine.contiguous().view(torch.int32), came.contiguous().view(torch.int32)):
            raise caught("audit.other-result", f"in epoch {at.epoch}, step {at.step}, {what} was another one")


def check_end(spec: ModelSpec, zone: Zone, commitment: bytes) -> None:
    """Raise IntegrityError `audit.other-state` unless the repeated steps end in the state that was committed to."""
    if not same(to_raw(model_digest(spec, zone.state())), commitment):
        raise caught("audit.other-state", "its weights after these steps are other ones")


def caught(code: str, what: str) -> IntegrityError:
    """The error of a finding: it stops the run for good."""
    return IntegrityError(
        code,
        f"the center does not compute what the plan says: {what}",
        step="audit center",
        fix="Stop trusting this host; if it is honest, its CPU computes other bits: see docs/threat-model.md.",
    )
