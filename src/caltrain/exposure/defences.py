"""Defences at a cut, and what they cost in accuracy.

All of them keep a gradient that an attacker can use (quantisation passes it straight through), so that a defence does
not look strong only because the attack was blinded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.exposure.defence_spec import DefenceSpec
from caltrain.exposure.figures import Estimate
from caltrain.exposure.statistics import rate_estimate
from caltrain.exposure.subject import Cut, Defence, Live
from caltrain.models.network import zone_of

_BATCH, _TUNING_BATCH = 256, 128


def defended(cut: Cut, spec: DefenceSpec, own: Tensor, *, seed: int) -> Cut:
    """The same cut with a defence that is calibrated on the undefended IR of up to 256 of one's own pictures."""
    with torch.no_grad():
        live = Cut(cut.subject, cut.front).ir(own[:_BATCH])
    return Cut(cut.subject, cut.front, make_defence(spec, live, seed=seed))


def make_defence(spec: DefenceSpec, calibration: Live, *, seed: int) -> Defence:
    """A defence for live tensors like those of `calibration`: tensors (N, ...) each.

    Channels cross that vary most over `calibration`: it costs the least accuracy, and which they are is no secret.
    Noise is drawn anew at every call. Levels of quantisation lie evenly between a record's least and largest value.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = [_mask(tensor, spec.keep) for tensor in calibration]
    scales = [spec.noise * float(tensor.std()) for tensor in calibration]

    def defence(live: Live) -> Live:
        crossing = []
        for tensor, mask, scale in zip(live, masks, scales, strict=True):
            x = tensor * mask
            if scale:
                x = x + scale * mask * torch.randn(x.shape, generator=generator)
            crossing.append(x if spec.bits is None else _quantised(x, spec.bits) * mask)
        return tuple(crossing)

    return defence


def _mask(tensor: Tensor, keep: float) -> Tensor:
    """1 for channels (of tokens: features) that cross, 0 for others, to multiply a record (1, ...) with."""
    channel = 2 if tensor.dim() == 3 else 1
    others = [d for d in range(tensor.dim()) if d != channel]
    variance = tensor.var(others)
    mask = torch.zeros_like(variance)
    mask[variance.argsort(descending=True, stable=True)[: max(round(keep * len(variance)), 1)]] = 1
    return mask.reshape([-1 if d == channel else 1 for d in range(tensor.dim())])


def _quantised(x: Tensor, bits: int) -> Tensor:
    """Each record of (N, ...) rounded to 2^bits levels; its gradient is that of `x`."""
    flat = x.detach().flatten(1)
    low, high = (bound.reshape(-1, *[1] * (x.dim() - 1)) for bound in flat.aminmax(dim=1))
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    rounded = low + ((x.detach() - low) / step).round() * step
    passed: Tensor = rounded + (x - x.detach())
    return passed


def accuracy(cut: Cut, pictures: Tensor, labels: Tensor) -> Estimate:
    """Share of pictures whose label is the model's first choice, with the cut's defence on."""
    hits = 0
    with torch.inference_mode():
        for part, own in zip(torch.split(pictures, _BATCH), torch.split(labels, _BATCH), strict=True):
            hits += int((cut.answer(cut.ir(part)).argmax(1) == own).sum())
    return rate_estimate(hits, len(labels))


def tuned(
    cut: Cut,
    own: Tensor,
    own_labels: Tensor,
    *,
    steps: int = 300,
    rate: float = 0.01,
    seed: int,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> Cut:
    """The cut before a copy of the rest of the model that has learned, on one's own pictures, to live with the defence.

    Plain SGD with momentum in batches of 128; the FrontNet stays as it is, and so does the subject.
    """
    subject = cut.subject
    module = copy.deepcopy(subject.module)
    rest = zone_of(module, subject.spec, range(cut.front, len(subject.spec.layers)))
    rest.train()
    for parameter in rest.parameters():
        parameter.requires_grad_(True)  # noqa: FBT003
    optimiser = torch.optim.SGD(rest.parameters(), lr=rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(own), (_TUNING_BATCH,), generator=generator)
        with torch.no_grad():
            live = cut.ir(own[rows])
        (logits,), _ = rest.through(live)
        optimiser.zero_grad()
        F.cross_entropy(logits, own_labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        on_step(step + 1, steps)
    rest.eval()
    for parameter in rest.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    return Cut(replace(subject, module=module), cut.front, cut.defence)


def tuned_accuracy(
    cut: Cut,
    own: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    *,
    steps: int = 300,
    seed: int,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> Estimate:
    """Accuracy on others' (pictures, labels) after `tuned` on one's own."""
    return accuracy(tuned(cut, *own, steps=steps, seed=seed, on_step=on_step), *others)
