"""How long an assessment takes: seconds for each cut and measure.

The networks have random weights and the pictures are drawn: what is computed does not depend on either. KL goes over
all cuts in one pass; its seconds are that pass's, shared out evenly.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from caltrain.exposure.asked import Asked
from caltrain.exposure.assess import Assessor, OnStep
from caltrain.exposure.material import gather
from caltrain.exposure.statistics import rate_estimate
from caltrain.exposure.subject import Subject, subject_from
from caltrain.exposure.validator import Validator
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import model_digest, state_of
from caltrain.models.zoo import resnet9_28
from caltrain.presets import STARTS, StartName
from caltrain.records.schema import DataSchema
from caltrain.training.seeds import initialise

_OWN = 2048


class CutSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """One cut: maps that it has and that were shown for most inputs, seconds by measure."""

    front: int
    layer: str
    maps: int
    maps_shown: int
    seconds: dict[str, float]


class ExposureBench(msgspec.Struct, frozen=True, kw_only=True):
    """`kl_seconds`: KL over all cuts together, on `kl_inputs` inputs; attacks on `targets` pictures each."""

    model: str
    validator: str
    threads: int
    budget: str
    targets: int
    kl_inputs: int
    kl_maps: int | None
    kl_seconds: float
    cuts: tuple[CutSeconds, ...]
    simulated: bool = False


def run(
    model: StartName,
    *,
    asked: Asked,
    targets: int,
    threads: int,
    clock: Callable[[], float],
    on_step: OnStep = lambda _what, _done, _of: None,
) -> ExposureBench:
    """Assess an included model once, as `asked`."""
    torch.set_num_threads(threads)
    start = STARTS[model]
    subject = _drawn(start.model, start.data)
    fits = min(start.data.shape[1:]) >= 28
    judge = _drawn(resnet9_28(len(start.data.classes), width=48) if fits else start.model, start.data)
    generator = torch.Generator().manual_seed(asked.seed)
    count = max(asked.kl_inputs, targets)
    own, others = (_records(start.data, n, generator) for n in (_OWN, count))
    material = gather(subject, own, others, targets=targets, candidates=count, seed=asked.seed)
    validator = Validator(judge, rate_estimate(0, 1))  # random weights are right by chance alone: only timed here
    report = Assessor(subject, material, asked, validator=validator, clock=clock, on_step=on_step).run(
        data="drawn", threads=threads
    )
    cuts = tuple(
        CutSeconds(
            front=front,
            layer=cut.cost.layer,
            maps=cut.kl.channels if cut.kl else 0,
            maps_shown=cut.kl.maps_used if cut.kl else 0,
            seconds=cut.seconds,
        )
        for front, cut in report.cuts.items()
    )
    return ExposureBench(
        model=model,
        validator="resnet9_28, 48 wide" if fits else model,
        threads=threads,
        budget=asked.budget,
        targets=targets,
        kl_inputs=min(asked.kl_inputs, count),
        kl_maps=asked.maps,
        kl_seconds=sum(cut.seconds.get("kl", 0.0) for cut in cuts),
        cuts=cuts,
    )


def _drawn(spec: ModelSpec, data: DataSchema) -> Subject:
    module = build(spec, input_shape=data.shape)
    initialise(module, bytes(32))
    return subject_from(spec, data, module, digest=model_digest(spec, state_of(module)))


def _records(data: DataSchema, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    elements = torch.randint(0, 256, (count, *data.shape), generator=generator).to(torch.uint8)
    return elements, torch.randint(0, len(data.classes), (count,), generator=generator)
