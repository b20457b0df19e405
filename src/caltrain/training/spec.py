"""Hyper-parameters of a plan, as data. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Augment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Drawn afresh for each record and epoch: a shift of at most `shift` pixels (zeros come in), a mirror."""

    shift: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    flip: bool = False


class TrainingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stochastic gradient descent with momentum; a batch that would not be full is left out of its epoch."""

    epochs: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    batch: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)]
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    augment: Augment = Augment()
    channels_last: bool = True
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 2
