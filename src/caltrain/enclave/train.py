"""Training inside: shuffle, augment, FrontNet, and (ternary form) HeadNet with the loss. The middle is outside.

One step, two-way:  x -> FrontNet -> IR and labels out; CenterNet and loss outside; IR gradient in -> FrontNet steps.
One step, ternary:  x -> FrontNet -> IR out; center output in -> HeadNet and loss -> its gradient out;
                    IR gradient in -> FrontNet steps. No label and no logit crosses.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from caltrain.boundary.messages import Done, TrainEpoch
from caltrain.boundary.tensors import Role
from caltrain.crypto.digests import to_text
from caltrain.enclave.ingest import unpack
from caltrain.enclave.run import Run, State, present
from caltrain.errors import DataError, ProtocolError
from caltrain.models.spec import layer_shapes
from caltrain.models.weights import model_digest, state_of
from caltrain.plan import Plan
from caltrain.training.batches import augment, normalise
from caltrain.training.seeds import Draws, RunSeeds, epoch_order


def train_epoch(run: Run, message: TrainEpoch) -> tuple[Done, State]:
    """One epoch over the freshly shuffled pool."""
    plan, manifest, pool = present(run.plan), present(run.manifest), present(run.pool)
    if message.epoch != run.epoch:
        raise ProtocolError(
            "train.other-epoch",
            f"epoch {message.epoch} was asked for, epoch {run.epoch} is next",
            step="train",
            fix="Ask for the epochs in order.",
        )
    seeds, epoch, total = run.seeds, run.epoch, 0.0
    steps = manifest.records() // plan.training.batch
    pool.shuffle(epoch_order(manifest.records(), seed=seeds.order, epoch=epoch).numpy().astype(np.int64))
    for step, rows in enumerate(pool.batches(plan.training.batch)):
        elements, labels = unpack(rows, plan.data)
        x = augment(elements, plan.training.augment, Draws(seeds.augment, epoch, step))
        x = normalise(x, plan.data, channels_last=plan.training.channels_last)
        total += _step(run, x, labels, step=step, steps=steps)
        run.door.progress("train", step + 1, steps, loss=total / (step + 1))
    run.epoch += 1
    _checkpoint(run, plan, epoch, seeds)
    run.record("epoch", {"epoch": epoch, "loss": f"{total / steps:.6f}", "records": steps * plan.training.batch})
    last = run.epoch == plan.training.epochs
    return Done(loss=total / steps, images=steps * plan.training.batch), State.TRAINED if last else State.READY


def _step(run: Run, x: Tensor, labels: Tensor, *, step: int, steps: int) -> float:
    front, epoch = present(run.front), run.epoch
    ir = front.forward(x, epoch=epoch, step=step, needs_input_grad=False)
    if not bool(ir.isfinite().all()):
        raise DataError(
            "train.overflow",
            "the FrontNet's values for a batch are not finite numbers",
            step="train",
            fix="Lower the learning rate; with f32 data, look for records with huge elements.",
        )
    if run.head is None:
        outgoing: dict[Role, Tensor] = {"ir": ir, "labels": labels}
        loss = float(_exchange(run, outgoing, "loss", (1,), step))
        grad = _exchange(run, {}, "ir-grad", tuple(ir.shape), step)
    else:
        center = _exchange(run, {"ir": ir}, "center-out", _center_shape(run, len(x)), step)
        run.head.forward(center, epoch=epoch, step=step, needs_input_grad=True)
        head_grad, loss = run.head.backward_from_labels(labels, epoch=epoch, step=step, steps=steps)
        grad = _exchange(run, {"center-grad": present(head_grad)}, "ir-grad", tuple(ir.shape), step)
    front.backward(grad, epoch=epoch, step=step, steps=steps)
    return loss


def _exchange(run: Run, outgoing: dict[Role, Tensor], due: Role, shape: tuple[int, ...], step: int) -> Tensor:
    return run.door.exchange(outgoing, due=due, shape=shape, run=run.vault.run, epoch=run.epoch, step=step)


def _center_shape(run: Run, batch: int) -> tuple[int, ...]:
    plan = present(run.plan)
    shapes = layer_shapes(plan.model, plan.data.shape)
    return (batch, *shapes[len(plan.model.layers) - plan.partition.head])


def _checkpoint(run: Run, plan: Plan, epoch: int, seeds: RunSeeds) -> None:
    """Commit both sides to their state: ours by digest, the host's by what it says now and is held to at release."""
    zones = [zone.module for zone in (run.front, run.head) if zone is not None]
    # Keyed by a secret of the run: a digest of weights alone would let a guess of them be confirmed.
    inside = model_digest(
        plan.model, state_of(*zones) | {"key": torch.frombuffer(bytearray(seeds.front), dtype=torch.uint8)}
    )
    run.center_commitment = run.door.commit_center(epoch)
    run.record("checkpoint", {"epoch": epoch, "inside": inside, "center": to_text(run.center_commitment)})
