"""The bytes that must not be found outside of the enclave, in every form in which they might lie there."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from caltrain.plan import Plan
from caltrain.records.schema import DataSchema, encode_record
from caltrain.training.batches import normalise
from support.canary_replay import Replay
from support.canary_search import LabelVector, Needle

_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_LEVELS = (1, 6, 9)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """A record (C, H, W) or a weight (O, I, H, W) flat, in both memory layouts; anything else as it is."""
    if tensor.dim() < 3:
        return {"": tensor.reshape(-1)}
    *outer, channels, height, width = range(tensor.dim())
    last = tensor.permute(*outer, height, width, channels)
    return {" channels first": tensor.reshape(-1), " channels last": last.reshape(-1)}


def raw_bytes(flat: Tensor) -> bytes:
    """The elements of a flat tensor."""
    return flat.detach().contiguous().view(torch.uint8).numpy().tobytes()


def float_needles(kind: str, name: str, tensor: Tensor) -> Iterator[Needle]:
    """A float tensor in every float type and layout; eight elements in a row count as found."""
    for layout, flat in layouts(tensor).items():
        for dtype, torch_dtype in _FLOATS.items():
            data = raw_bytes(flat.to(torch_dtype))
            yield Needle(kind, f"{name} {dtype}{layout}", data, least=8 * torch_dtype.itemsize)


def byte_needles(kind: str, name: str, pixels: Tensor) -> Iterator[Needle]:
    """A u8 tensor in both layouts; sixteen elements in a row count as found."""
    for layout, flat in layouts(pixels).items():
        yield Needle(kind, f"{name} u8{layout}", raw_bytes(flat))


def wrapped(needle: Needle) -> Iterator[Needle]:
    """A needle, and the same as base64 (in each of the three alignments), hex and deflated."""
    yield needle
    for skip in range(3):
        # The last characters depend on what follows the needle in the encoded text.
        text = base64.b64encode(needle.data[skip:])[:-4]
        yield Needle(needle.kind, f"{needle.name} base64+{skip}", text, least=24)
    for digits in (needle.data.hex(), needle.data.hex().upper()):
        yield Needle(needle.kind, f"{needle.name} hex", digits.encode(), least=32)
    for level in _LEVELS:
        yield Needle(needle.kind, f"{needle.name} deflated-{level}", zlib.compress(needle.data, level)[2:-4])


def record_needles(
    data: DataSchema, run: Replay, *, pixels: Tensor, labels: Tensor, marked: Sequence[int]
) -> list[Needle]:
    """Each marked record: canonical, as bytes, normalised, and in each version that a step used."""
    plain: list[Needle] = []
    for number in marked:
        name = f"record {number}"
        plain += _as_it_is(data, name, pixels[number], int(labels[number]))
        for step in run.steps:
            for place in (step.batch == number).nonzero().flatten():
                version = f"{name} of epoch {step.epoch}"
                plain += byte_needles("record", version, step.pixels[place])
                plain += float_needles("record", version, step.x[place])
    return [form for needle in plain for form in wrapped(needle)]


def _as_it_is(data: DataSchema, name: str, pixels: Tensor, label: int) -> Iterator[Needle]:
    yield Needle("record", f"{name} canonical", encode_record(data, pixels.numpy(), label))
    yield from _as_asked("record", name, pixels, data)


def _as_asked(kind: str, name: str, pixels: Tensor, data: DataSchema) -> Iterator[Needle]:
    yield from byte_needles(kind, name, pixels)
    yield from float_needles(kind, f"{name} normalised", normalise(pixels[None], data, channels_last=False)[0])


def held_out_needles(data: DataSchema, pixels: Tensor, labels: Tensor) -> list[Needle]:
    """Records that are measured on and not trained on."""
    pairs = enumerate(zip(pixels, labels, strict=True))
    plain = [n for i, (x, label) in pairs for n in _as_it_is(data, f"held-out record {i}", x, int(label))]
    return [form for needle in plain for form in wrapped(needle)]


def question_needles(data: DataSchema, inputs: Tensor) -> list[Needle]:
    """What a user asks about."""
    plain = [n for i, pixels in enumerate(inputs) for n in _as_asked("question", f"question {i}", pixels, data)]
    return [form for needle in plain for form in wrapped(needle)]


def tensor_needles(kind: str, tensors: Mapping[str, Tensor], *, text: bool = True) -> list[Needle]:
    """Tensors by name, with `text` also in the forms of text; counters are left out."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    plain = [n for name, tensor in floats.items() for n in float_needles(kind, name, tensor)]
    return [form for needle in plain for form in (wrapped(needle) if text else [needle])]


def weight_needles(plan: Plan, run: Replay) -> list[Needle]:
    """FrontNet and HeadNet: every tensor at first and after every step; the first and the last ones also as text."""
    needles: list[Needle] = []
    for done, state in enumerate(run.states):
        inner = {f"{name} after {done} steps": value for name, value in run.inner(plan, state).items()}
        needles += tensor_needles("weights", inner, text=done in {0, len(run.states) - 1})
    return needles


def fingerprint_needles(fingerprints: Tensor) -> list[Needle]:
    """Every row of (N, D)."""
    return tensor_needles("fingerprint", {f"fingerprint {i}": row for i, row in enumerate(fingerprints)})


def secret_needles(secrets: dict[str, bytes]) -> list[Needle]:
    """Keys and seeds by name."""
    return [form for name, value in secrets.items() for form in wrapped(Needle("secret", name, value))]


def label_vectors(plan: Plan, run: Replay, *, labels: Tensor, parties: dict[str, slice]) -> list[LabelVector]:
    """The labels of each batch, of each party's records in the order of ingest, and of the pool in each epoch."""
    classes, steps = len(plan.data.classes), len(labels) // plan.training.batch
    orders = {f"batch {s.epoch}.{s.step}": s.labels for s in run.steps}
    orders |= {f"records of {name}": labels[part] for name, part in parties.items()}
    for epoch in range(plan.training.epochs):
        taken = [s.labels for s in run.steps[epoch * steps : (epoch + 1) * steps]]
        orders[f"epoch {epoch}"] = torch.cat(taken)
    return [LabelVector(name, vector.numpy().astype(np.int64), classes) for name, vector in orders.items()]
