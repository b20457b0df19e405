"""Hyper-parameters of a plan, as data. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from caltrain.crypto.digests import Digest

Unit = Annotated[float, msgspec.Meta(ge=0, le=1)]
Steps = Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]


class Augment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Drawn afresh for each record and epoch.

    `shift`: by at most so many pixels (zeros come in); `flip`: mirrored or not. As Darknet has them: `min_crop` to
    `max_crop`: the shorter side is scaled to that many pixels before the crop to the model's size; `angle`: turned by
    at most so many degrees; `aspect`: stretched by a factor of 1 to 1 + `aspect`, or its inverse; `hue`: shifted by at
    most so much of the circle; `saturation`, `exposure`: multiplied by a factor of 1 to 1 + this, or its inverse.
    """

    shift: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    flip: bool = False
    min_crop: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    max_crop: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    angle: Annotated[float, msgspec.Meta(ge=0, le=180)] = 0.0
    aspect: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    hue: Unit = 0.0
    saturation: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    exposure: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0


class InitialWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Public weights to start from: the SHA-256 of a safetensors file. Layers that it lacks are drawn from the seed.

    With `frozen` layers kept as they are, counted from the input. A run that starts so has no secret FrontNet.
    """

    sha256: Digest
    frozen: Annotated[int, msgspec.Meta(ge=0, le=512)] = 0


class TrainingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stochastic gradient descent with momentum; a batch that would not be full is left out of its epoch.

    `schedule` `poly` is Darknet's: rate * (1 - step / max_steps) ** power, steps from 1; `max_steps` 0: the whole run.
    `burn_in` steps rise as (step / burn_in) ** power before it. `clip_norm` bounds the norm of each zone's own
    gradient, so that no norm has to be exchanged; 0 is without. A checkpoint is made every `checkpoint_steps` (0: only
    between epochs). `patience` epochs without a better loss on the held-out records end the run (0: never).
    """

    epochs: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    batch: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=1000)]
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    schedule: Literal["constant", "cosine", "poly"] = "cosine"
    power: Annotated[float, msgspec.Meta(ge=0, le=100)] = 4.0
    max_steps: Steps = 0
    burn_in: Steps = 0
    warmup_epochs: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    clip_norm: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    augment: Augment = Augment()
    initial: InitialWeights | None = None
    channels_last: bool = True
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 2
    checkpoint_steps: Steps = 0
    patience: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0


class CenterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the parties ask of the part outside.

    `audit_rate`: the share of short runs of `audit_steps` steps that the enclave repeats bit for bit. `device` `any`
    lets it run on an accelerator, `precision` `bf16` in mixed precision: both are outside the promise of equal bits,
    so neither goes with an audit. `max_rms` bounds what comes in: the root mean square of each tensor.
    """

    audit_rate: Unit = 0.0
    audit_steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 4
    device: Literal["cpu", "any"] = "cpu"
    precision: Literal["f32", "bf16"] = "f32"
    max_rms: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1e4
