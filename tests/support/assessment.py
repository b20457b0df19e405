"""A model of digits that a test trains in seconds, the material of its assessment, and attacks that hardly compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

import pytest
import torch

from caltrain.exposure.attacks import inverter, shadow, whitebox
from caltrain.exposure.attacks.inverter import InverterBudget
from caltrain.exposure.attacks.shadow import ShadowBudget
from caltrain.exposure.attacks.whitebox import Prior, WhiteboxBudget
from caltrain.exposure.material import Material, gather
from caltrain.exposure.open_data import open_records
from caltrain.exposure.subject import Subject, subject_of
from caltrain.models.layers import Conv, Flatten, Linear
from caltrain.models.spec import ModelSpec, Partition
from caltrain.models.weights import state_of
from caltrain.presets import PRESETS
from caltrain.training.plain import train_plain
from caltrain.training.seeds import RunSeeds
from caltrain.training.spec import TrainingSpec

NET = ModelSpec(layers=(Conv(filters=12), Conv(filters=12, stride=2), Conv(filters=12), Flatten(), Linear(units=10)))
CUTS = (1, 2, 3, 4)


@cache
def digits_model() -> Subject:
    """A net with four cuts, right on about nine of ten digits."""
    data = PRESETS["digits"].data
    (pixels, labels), _ = open_records("digits", data)
    training = TrainingSpec(epochs=4, batch=32, learning_rate=0.05, threads=1)
    seeds = RunSeeds.from_run_seed(bytes(32))
    module = train_plain(NET, Partition(front=1), data, training, pixels=pixels, labels=labels, seeds=seeds)
    return subject_of(NET, data, state_of(module))


def digits_material(subject: Subject, *, own: int = 2000) -> Material:
    """16 targets among 100 candidates of the test part; own records are at most so many of the training part."""
    records, others = open_records("digits", subject.data)
    return gather(subject, records, others, targets=16, candidates=100, most_own=own)


@contextmanager
def hardly_computing() -> Iterator[None]:
    """The quick budget, made so small that only its shape is left: figures of it say nothing of a cut. One thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = InverterBudget(width=8, depth=1, steps=8, batch=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inverter.BUDGETS, "quick", small)
        patch.setitem(shadow.BUDGETS, "quick", ShadowBudget(steps=4, inverter=small, batch=16))
        patch.setitem(whitebox.BUDGETS, "quick", WhiteboxBudget(40, (Prior(0.01, 0.0),)))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def ticks() -> Callable[[], float]:
    """A clock that goes on by a second at each look."""
    seconds = count()
    return lambda: float(next(seconds))
