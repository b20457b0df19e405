"""Maps of a batch, shown to a validator, and how far its answers lie from the one for the input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caltrain.exposure.correlation import check_ir
from caltrain.exposure.maps import map_count, maps_of
from caltrain.exposure.subject import Defence, Live, Subject, check_finite
from caltrain.exposure.validator import Validator
from caltrain.models.layers import Dropout, Flatten, sources_of
from caltrain.models.network import zone_of
from caltrain.models.spec import layer_shapes, live_at

_MAPS_AT_ONCE = 1024


@dataclass(frozen=True)
class Table:
    """Divergences (n, m) of one tensor's maps with numbers `index` (m,), of `count`: of the input, of another one."""

    own: Tensor
    other: Tensor
    index: Tensor
    count: int

    def only(self, chosen: Tensor) -> Table:
        """Of a table of all maps, those chosen."""
        return Table(self.own[:, chosen], self.other[:, chosen], chosen, self.count)


@dataclass(frozen=True)
class Seen:
    """A batch: KL from uniform (n,), a table for each tensor, and which tensors cross at which cut."""

    uniform: Tensor
    tables: list[Table]
    parts: dict[int, list[int]]

    def only(self, chosen: list[Tensor]) -> Seen:
        """With the chosen maps of each tensor."""
        tables = [table.only(index) for table, index in zip(self.tables, chosen, strict=True)]
        return Seen(self.uniform, tables, self.parts)

    def least(self, front: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each input (n,): the least divergence at a cut, the number of its map, and the least of another input."""
        tables = [self.tables[part] for part in self.parts[front]]
        starts = itertools.accumulate((table.count for table in tables), initial=0)
        numbers = torch.cat([table.index + start for table, start in zip(tables, starts, strict=False)])
        own, place = torch.cat([table.own for table in tables], dim=1).min(1)
        return own, numbers[place], torch.cat([table.other for table in tables], dim=1).amin(1)


class Progress:
    """Counts maps shown."""

    def __init__(self, on_step: Callable[[int, int], None] | None, total: int) -> None:
        self.on_step, self.done, self.total = on_step, 0, total

    def add(self, maps: int) -> None:
        """So many more were shown."""
        self.done += maps
        if self.on_step is not None:
            self.on_step(self.done, self.total)


class Look:
    """Shows maps of a batch to the validator; one pass of the generator serves all cuts."""

    def __init__(self, subject: Subject, cuts: list[int], validator: Validator, defence: Defence) -> None:
        self.subject, self.cuts, self.validator, self.defence = subject, cuts, validator, defence

    def counts(self, pictures: Tensor) -> list[int]:
        """Maps of each tensor that crosses anywhere. Refuses an IR that is constant over these pictures."""
        tensors, parts = self._crossing(pictures)
        for front in self.cuts:
            check_ir(tuple(tensors[part] for part in parts[front]))
        return [map_count((tensor,)) for tensor in tensors]

    def __call__(self, pictures: Tensor, chosen: list[Tensor] | None, progress: Progress) -> Seen:
        """Divergences of the chosen maps of each tensor, or of all."""
        truth = self.validator.log_probabilities(pictures)
        tensors, parts = self._crossing(pictures)
        tables = []
        for number, tensor in enumerate(tensors):
            count = map_count((tensor,))
            index = torch.arange(count) if chosen is None else chosen[number]
            tables.append(self._table(truth, tensor, index, count, progress))
        uniform = (truth.exp() * truth).sum(1) + math.log(truth.shape[1])
        return Seen(uniform.clamp(min=0), tables, parts)

    def _crossing(self, pictures: Tensor) -> tuple[list[Tensor], dict[int, list[int]]]:
        """Each tensor that crosses at a cut, once, and which of them cross at which cut."""
        live: Live = (self.subject.inputs(pictures),)
        before = 0
        tensors: list[Tensor] = []
        parts: dict[int, list[int]] = {}
        for front in self.cuts:
            live = zone_of(self.subject.module, self.subject.spec, range(before, front)).through(live)[0]
            crossing, before = self.defence(live), front
            for tensor in crossing:
                check_finite(tensor, f"what crosses at cut {front}")
            crossing = unflattened(self.subject, front, crossing)
            # The same object crosses again behind a layer that only passes it on, and where a later layer reads it.
            for tensor in crossing:
                if not any(tensor is known for known in tensors):
                    tensors.append(tensor)
            parts[front] = [next(i for i, known in enumerate(tensors) if known is tensor) for tensor in crossing]
        return tensors, parts

    def _table(self, truth: Tensor, tensor: Tensor, index: Tensor, count: int, progress: Progress) -> Table:
        rows = []
        for part in torch.split(tensor, max(1, _MAPS_AT_ONCE // len(index))):
            grey = maps_of((part,), self.validator.size, index)
            judged = self.validator.log_probabilities(grey.flatten(0, 1)[:, None])
            rows.append(judged.reshape(*grey.shape[:2], -1))
            progress.add(grey.shape[0] * grey.shape[1])
        judged = torch.cat(rows)
        return Table(divergence(truth, judged), divergence(truth.roll(1, 0), judged), index, count)


def unflattened(subject: Subject, front: int, live: Live) -> Live:
    """What crosses, as planes where a layer only renamed their places: else that would look safe."""
    numbers = live_at(subject.spec.layers, front)
    return tuple(_as_planes(subject, *one) for one in zip(live, numbers, strict=True))


def _as_planes(subject: Subject, tensor: Tensor, number: int) -> Tensor:
    spec = subject.spec
    while number >= 0 and isinstance(spec.layers[number], Flatten | Dropout):
        number = sources_of(number, spec.layers[number])[0]
    shape = layer_shapes(spec, subject.data.shape)[number + 1]
    planes = tensor.dim() == 2 and len(shape) == 3 and tensor.shape[1] == math.prod(shape)
    return tensor.reshape(len(tensor), *shape) if planes else tensor


def divergence(truth: Tensor, judged: Tensor) -> Tensor:
    """KL (n, m) of log-probabilities (n, classes) from those of maps (n, m, classes), in nats."""
    truth = truth[:, None]
    return (truth.exp() * (truth - judged)).sum(2).clamp(min=0)  # rounding may go below
