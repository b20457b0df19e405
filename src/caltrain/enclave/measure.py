"""The model of this moment on the held-out records: labels and answers stay inside in either form."""

from __future__ import annotations

import os

import numpy as np
import torch.nn.functional as F

from caltrain.boundary.messages import Measured
from caltrain.enclave.ingest import unpack
from caltrain.enclave.pool import smallest
from caltrain.enclave.run import Run, present
from caltrain.models.spec import cut_shapes
from caltrain.training.batches import center_crop, normalise
from caltrain.training.zone import At

_BATCH = 256


def measure(run: Run) -> Measured:
    """Mean loss, top-1 and top-2 over all held-out records."""
    plan, pool, course = present(run.plan), present(run.held_out), present(run.course)
    count, loss, first, second = pool.shape.records, 0.0, 0, 0
    # In another order each time: the host must not learn to tell whose records these are.
    pool.shuffle(smallest(np.random.default_rng(int.from_bytes(os.urandom(16))).permutation(count)))
    cut = len(plan.model.layers) - plan.partition.head
    shapes = cut_shapes(plan.model, cut, plan.data.shape)
    done = 0
    for number, rows in enumerate(pool.batches(_BATCH, whole=False)):
        elements, labels = unpack(rows, plan.data)
        x = normalise(center_crop(elements, plan.model.size), plan.data, channels_last=plan.training.channels_last)
        live = present(run.front).infer((x,))
        live = run.door.exchange(
            {"eval-ir": live},
            due="eval-out",
            shapes=[(len(x), *shape) for shape in shapes],
            run=run.vault.run,
            at=At(course.epoch, number, 0),
        )
        (logits,) = run.head.infer(live) if run.head else live
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        best = logits.topk(min(2, logits.shape[1])).indices == labels[:, None]
        first, second = first + int(best[:, 0].sum()), second + int(best.any(1).sum())
        done += len(x)
        run.door.progress("measure", done, count)
    return Measured(count, loss / count, first / count, second / count)


def rounded(measured: Measured) -> Measured:
    """What may leave: to three digits, or the host could read labels off the rest, whose inputs it can choose."""
    return Measured(measured.records, *(round(x, 3) for x in (measured.loss, measured.top1, measured.top2)))
