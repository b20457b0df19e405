"""How much shared memory a run's tensors need."""

from __future__ import annotations

import math

from caltrain.models.spec import cut_shapes
from caltrain.plan import Plan

_ALIGN = 4096


def slot_bytes(plan: Plan) -> int:
    """The most that crosses together, rounded up to pages."""
    partition = plan.partition
    cuts = {partition.front, *(d.front for d in partition.deepen), len(plan.model.layers) - partition.head}
    sizes = [sum(map(math.prod, cut_shapes(plan.model, cut, plan.data.shape))) for cut in cuts]
    largest = max(sizes) * plan.training.batch * 4
    return math.ceil(largest / _ALIGN) * _ALIGN
