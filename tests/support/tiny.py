"""The smallest plan that has everything: a cut in two places, batch normalisation, dropout, augmentation, users."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from caltrain.models.layers import Conv, Dropout, Flatten, Linear, MaxPool
from caltrain.models.spec import ModelSpec, Partition
from caltrain.plan import EnclaveSpec, Party, Plan, ReleaseSpec, Right, TraceSpec, User
from caltrain.records.schema import DataSchema
from caltrain.training.spec import Augment, TrainingSpec
from support.members import Member, Pixels

Element = Literal["u8", "f32"]
MEASUREMENT = "sha384:" + "ab" * 48
PARTIES = ("alpha", "beta", "gamma")
RIGHTS: dict[str, tuple[Right, ...]] = {"una": ("predict", "trace", "verdict"), "pat": ("predict",)}
SHAPE = (1, 4, 4)
CLASSES = ("cat", "dog", "owl")
MODEL = ModelSpec(
    layers=(
        Conv(filters=4, batch_norm=True),
        MaxPool(),
        Conv(filters=4),
        Dropout(p=0.25),
        Flatten(),
        Linear(units=len(CLASSES)),
    )
)


def pictures(records: int, *, seed: int, dtype: Element = "u8") -> Pixels:
    """Distinct random pictures (N, 1, 4, 4)."""
    values = np.random.default_rng(seed).integers(0, 256, (records, *SHAPE))
    return values.astype(np.uint8) if dtype == "u8" else (values / 256).astype("<f4")


def tiny_plan(
    parties: Iterable[Member],
    users: Iterable[Member],
    *,
    head: int,
    dtype: Element,
    epochs: int,
    budget: int,
    reveal: bool,
) -> Plan:
    """A plan of these parties and of users with their `RIGHTS`; two-way with `head` 0, else ternary."""
    return Plan(
        version=1,
        name="tiny",
        model=MODEL,
        partition=Partition(front=2, head=head),
        data=DataSchema(shape=SHAPE, dtype=dtype, classes=CLASSES),
        training=TrainingSpec(
            epochs=epochs, batch=8, learning_rate=0.05, augment=Augment(shift=1, flip=True), threads=1
        ),
        parties=tuple(Party(name=p.name, public_key=p.signer.public) for p in parties),
        users=tuple(User(name=u.name, public_key=u.signer.public, may=RIGHTS[u.name], budget=budget) for u in users),
        enclave=EnclaveSpec(measurement=MEASUREMENT),
        trace=TraceSpec(neighbours=5, suspicion_neighbours=4),
        release=ReleaseSpec(reveal_seed=reveal),
    )
