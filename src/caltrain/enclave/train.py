"""Training inside: shuffle, augment, FrontNet, and (ternary form) HeadNet with the loss. The middle is outside.

One step, two-way:  x -> FrontNet -> IR and labels out; CenterNet and loss outside; IR gradient in -> FrontNet steps.
One step, ternary:  x -> FrontNet -> IR out; center output in -> HeadNet and loss -> its gradient out;
                    IR gradient in -> FrontNet steps. No label and no logit crosses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from caltrain.boundary.channel import Tensors
from caltrain.boundary.messages import Done, Measured, Train
from caltrain.boundary.tensors import Role
from caltrain.enclave.assess import check_assessed
from caltrain.enclave.audit import Crossing, caught, check_end, repeat
from caltrain.enclave.checkpoint import write_checkpoint
from caltrain.enclave.finite import check_finite
from caltrain.enclave.ingest import unpack
from caltrain.enclave.measure import measure, rounded
from caltrain.enclave.pool import smallest
from caltrain.enclave.run import Batch, Course, Run, State, present
from caltrain.enclave.zones import center_zone, same_center, shown_center
from caltrain.errors import CaltrainError, IntegrityError, ProtocolError
from caltrain.models.spec import cut_shapes
from caltrain.training.batches import augment, normalise
from caltrain.training.prefetch import Prefetch
from caltrain.training.seeds import Draws, epoch_order
from caltrain.training.zone import At


def train(run: Run, message: Train) -> tuple[Done, State]:
    """From the step where the run is to its next checkpoint, at the latest the end of the epoch."""
    plan, course, audit = present(run.plan), present(run.course), present(run.audit)
    _check_place(run, course, message)
    if course.step == 0:
        _begin_epoch(run, course)
    if run.batches is None:
        batches = _batches(run, course.epoch, course.step)
        run.batches = Prefetch(batches) if run.door.reads_ahead else batches
    every = plan.training.checkpoint_steps or run.steps
    stop = min(run.steps, (course.step // every + 1) * every)
    while course.step < stop:
        length = min(audit.length, stop - course.step) if audit.rate else stop - course.step
        _short_run(run, length, durable=course.step + length == stop)
    loss, measured, state = course.loss / stop, None, State.READY
    if stop == run.steps:
        measured, state = _end_epoch(run, course)
    if audit.rate:
        run.record("audit", {"rate": audit.rate, "runs": audit.runs, "repeated": audit.audited})
    write_checkpoint(run, state)
    reply = Done(loss=loss, held_out=measured, state=state, at=(course.epoch, course.step), front=course.front)
    return reply, state


def _check_place(run: Run, course: Course, message: Train) -> None:
    """The host must go on exactly where the run is, with the CenterNet that it committed to."""
    if (message.epoch, message.step) != (course.epoch, course.step):
        raise ProtocolError(
            "train.not-here",
            f"step {message.epoch}.{message.step} was asked for, {course.epoch}.{course.step} is next",
            step="train",
            fix="Ask for the steps in order.",
        )
    planned, moved = present(run.plan).partition.front_at(course.epoch), run.chain.last("cut", "front", 0)
    least = max(planned, moved, check_assessed(run))
    if course.front < least:
        raise ProtocolError(
            "train.too-shallow",
            f"the FrontNet has {course.front} layers, in epoch {course.epoch} it must have {least}",
            step="train",
            fix="Deepen the cut first.",
        )
    same_center(run)


def _begin_epoch(run: Run, course: Course) -> None:
    course.loss = 0.0
    # In few bytes, and held by nobody but the shuffle: this is what grows with the records.
    present(run.pool).shuffle(smallest(epoch_order(run.records, seed=run.seeds.order, epoch=course.epoch).numpy()))


def _end_epoch(run: Run, course: Course) -> tuple[Measured | None, State]:
    """Measure the model, and decide whether this was the last epoch."""
    training = present(run.plan).training
    body: dict[str, object] = {
        "epoch": course.epoch,
        "loss": f"{course.loss / run.steps:.6f}",
        "records": run.steps * training.batch,
    }
    if isinstance(run.batches, Prefetch):
        run.batches.close()
    run.batches = None
    measured = measure(run) if run.held_out else None
    if measured is not None:
        course.since = 0 if measured.loss < course.best else course.since + 1
        course.best = min(course.best, measured.loss)
        measured = rounded(measured)
        body |= {"held_out": f"{measured.loss:.3f}", "top1": f"{measured.top1:.3f}", "top2": f"{measured.top2:.3f}"}
    run.record("epoch", body)
    course.epoch, course.step = course.epoch + 1, 0
    early = training.patience > 0 and course.since >= training.patience
    return measured, State.TRAINED if early or course.epoch == training.epochs else State.READY


def _batches(run: Run, epoch: int, first: int) -> Iterator[Batch]:
    """Augmented, normalised batches of an epoch, from step `first` on."""
    plan, pool = present(run.plan), present(run.pool)
    training, data, seed = plan.training, plan.data, run.seeds.augment
    for step, rows in enumerate(pool.batches(training.batch, first=first), start=first):
        elements, labels = unpack(rows, data)
        x = augment(elements, training.augment, Draws(seed, epoch, step), size=plan.model.size)
        yield normalise(x, data, channels_last=training.channels_last), labels


def _short_run(run: Run, length: int, *, durable: bool) -> None:
    """Some steps, the host's commitment to what they made of the CenterNet, and the audit if they were chosen."""
    course, audit = present(run.course), present(run.audit)
    began, before = (course.epoch, course.step), course.center
    for _ in range(length):
        audit.note(_step(run, course))
        course.step += 1
        run.door.progress("train", course.step, run.steps, loss=course.loss / course.step)
    here = (course.epoch, course.step) if course.step < run.steps else (course.epoch + 1, 0)
    course.center = run.door.commit_center(*here, durable=durable)
    crossed = audit.end()
    if crossed:
        _repeat(run, crossed, began, before)


def _repeat(run: Run, crossed: Sequence[Crossing], began: tuple[int, int], before: bytes) -> None:
    zone = center_zone(run)
    try:
        zone.load(shown_center(run, began, before), step="audit center")
    except IntegrityError as error:
        if error.reported:
            raise caught("audit.not-shown", "the host did not show its state") from error
        raise caught("audit.other-start", error.what) from error
    except CaltrainError as error:
        if error.code == "door.closed":
            raise
        raise caught("audit.not-shown", "the host did not show its state") from error
    repeat(zone, crossed)
    check_end(present(run.plan).model, zone, present(run.course).center)


def _step(run: Run, course: Course) -> Crossing:
    x, labels = next(present(run.batches))
    front, at = present(run.front), At(course.epoch, course.step, run.steps)
    ir = front.forward((x,), at=at, needs_input_grad=False)
    check_finite(ir, "the FrontNet's values for a batch")
    shapes = [tuple(t.shape) for t in ir]
    if run.head is None:
        (loss,) = _exchange(run, {"ir": ir, "labels": (labels,)}, "loss", [(1,)], at)
        grads = _exchange(run, {}, "ir-grad", shapes, at)
        crossing = Crossing(at, ir, grads, labels=labels, loss=loss.item())
    else:
        out = _exchange(run, {"ir": ir}, "center-out", _center_shapes(run, len(x)), at)
        run.head.forward(out, at=at, needs_input_grad=True)
        out_grad, value = run.head.backward_from_labels(labels, at=at)
        check_finite([*out_grad, torch.tensor(value)], "the HeadNet's loss or its gradient")
        grads = _exchange(run, {"center-grad": out_grad}, "ir-grad", shapes, at)
        crossing = Crossing(at, ir, grads, out, tuple(out_grad), loss=value)
    front.backward(grads, at=at)
    course.loss += crossing.loss
    return crossing


def _exchange(
    run: Run, outgoing: dict[Role, Tensors | list[torch.Tensor]], due: Role, shapes: list[tuple[int, ...]], at: At
) -> Tensors:
    return run.door.exchange(outgoing, due=due, shapes=shapes, run=run.vault.run, at=at)


def _center_shapes(run: Run, batch: int) -> list[tuple[int, ...]]:
    plan = present(run.plan)
    cut = len(plan.model.layers) - plan.partition.head
    return [(batch, *shape) for shape in cut_shapes(plan.model, cut, plan.data.shape)]
