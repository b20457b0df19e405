"""Weights: only what fits is loaded, garbage is refused by name, and one bit makes another model."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from caltrain.errors import IntegrityError
from caltrain.models.layers import Conv, Flatten, Linear
from caltrain.models.network import build, lay_out
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import decode_state, encode_state, load_zone, model_digest, state_of
from caltrain.training.seeds import initialise

SPEC = ModelSpec(layers=(Conv(filters=2, batch_norm=True), Flatten(), Linear(units=3)))
State = dict[str, Tensor]


def model(seed: int = 0) -> nn.Sequential:
    module = build(SPEC, input_shape=(2, 3, 3))
    initialise(module, bytes([seed]) * 32)
    return module


def state(seed: int = 0) -> State:
    return state_of(model(seed))


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


# --- files -----------------------------------------------------------------------------------------------------


def test_a_state_survives_the_file() -> None:
    odd = state() | {"scalar": torch.tensor(3), "empty": torch.empty(0, 2), "bytes": torch.arange(5, dtype=torch.uint8)}
    assert equal(decode_state(encode_state(odd), step="test"), odd)


def test_the_file_does_not_depend_on_the_order_of_insertion() -> None:
    ours = state()
    assert encode_state(dict(reversed(ours.items()))) == encode_state(ours)


def test_a_state_is_a_copy_and_contiguous() -> None:
    module = model()
    lay_out(module, channels_last=True)
    taken = state_of(module)
    assert all(value.is_contiguous() and not value.requires_grad for value in taken.values())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert equal(taken, state())


def test_zones_together_have_the_state_of_the_whole() -> None:
    parts = [build(SPEC, input_shape=(2, 3, 3), layers=layers) for layers in (range(1), range(1, 2), range(2, 3))]
    for part in parts:
        initialise(part, bytes(32))
    assert equal(state_of(*parts), state())


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "F32", shape: list[int] | None = None, start: int = 0, stop: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [start, stop]}


GARBAGE = {
    "nothing": b"",
    "half a length": b"\x01\0\0",
    "no header": struct.pack("<Q", 10),
    "a giant header": struct.pack("<Q", 1 << 60) + b"{}",
    "no JSON": safetensors(b"not json"),
    "no UTF-8": safetensors(b'{"\xff\xff":1}'),
    "a list": safetensors([]),
    "no fields": safetensors({"a": {}}),
    "deep nesting": safetensors(b'{"a":' * 100_000),
    "an unknown type": safetensors({"a": entry("F7")}, bytes(4)),
    "a type torch lacks": safetensors({"a": entry("F4", [2], 0, 1)}, bytes(1)),
    "fewer bytes": safetensors({"a": entry()}, bytes(3)),
    "more bytes": safetensors({"a": entry()}, bytes(5)),
    "a hole": safetensors({"a": entry(), "b": entry(start=8, stop=12)}, bytes(12)),
    "an overlap": safetensors({"a": entry(), "b": entry(start=0, stop=4)}, bytes(4)),
    "a size that is not its bytes": safetensors({"a": entry(shape=[2])}, bytes(4)),
    "a size beyond 64 bits": safetensors({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(4)),
    "a size beyond numbers, of no bytes": safetensors({"a": entry(shape=[1 << 63, 0], start=0, stop=0)}),
    "a negative size": safetensors({"a": entry(shape=[-1])}, bytes(4)),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    "a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_safetensors_file_is_refused_by_name(raw: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"^weights\.malformed: .*\(step: release\)"):
        decode_state(raw, step="release")


def decoded_or_named(raw: bytes) -> None:
    try:
        decode_state(raw, step="test")
    except IntegrityError as error:
        code = error.code
    else:
        code = "weights.malformed"
    assert code == "weights.malformed"


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_unnamed(raw: bytes) -> None:
    decoded_or_named(raw)
    decoded_or_named(safetensors(raw))


SOUND = encode_state(state())


@settings(deadline=None, max_examples=300)
@given(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=12), st.booleans())
def test_mutated_files_raise_nothing_unnamed(at: int, put: bytes, cut: bool) -> None:
    decoded_or_named(SOUND[:at] + put + (b"" if cut else SOUND[at + len(put) :]))


# --- loading ---------------------------------------------------------------------------------------------------


def test_a_state_that_fits_is_copied_in() -> None:
    zone, given_state = model(0), state(1)
    load_zone(zone, given_state, step="test")
    assert equal(state_of(zone), given_state)
    given_state["0.conv.weight"].zero_()
    assert equal(state_of(zone), state(1)), "the zone must not share memory with what was given"


def changed(name: str, value: Tensor) -> State:
    return state(1) | {name: value}


def without(name: str) -> State:
    return {key: value for key, value in state(1).items() if key != name}


def spoilt(name: str, value: float) -> State:
    altered = state(1)
    altered[name].view(-1)[-1] = value
    return altered


@pytest.mark.parametrize(
    ("unfit", "why"),
    [
        ({}, "names differ"),
        (without("0.norm.bias"), "names differ: .*0.norm.bias"),
        (without("0.norm.num_batches_tracked"), "names differ"),
        (changed("extra", torch.zeros(1)), "names differ: .*extra"),
        (changed("2.linear.bias", torch.zeros(4)), "2.linear.bias is \\(4,\\)"),
        (changed("2.linear.bias", torch.zeros(1)), "2.linear.bias is \\(1,\\)"),
        (changed("2.linear.bias", torch.tensor(0.0)), "2.linear.bias is \\(\\)"),
        (changed("2.linear.bias", torch.zeros(3, 1)), "2.linear.bias is \\(3, 1\\)"),
        (changed("2.linear.bias", torch.zeros(3, dtype=torch.float64)), "float64"),
        (changed("2.linear.bias", torch.zeros(3, dtype=torch.float16)), "float16"),
        (changed("2.linear.bias", torch.zeros(3, dtype=torch.int64)), "int64"),
        (changed("0.norm.num_batches_tracked", torch.tensor(1.0)), "float32"),
        (spoilt("2.linear.weight", float("nan")), "2.linear.weight is not finite"),
        (spoilt("0.norm.running_var", float("inf")), "0.norm.running_var is not finite"),
        (spoilt("0.norm.bias", float("-inf")), "0.norm.bias is not finite"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(unfit: State, why: str) -> None:
    zone = model(0)
    with pytest.raises(IntegrityError, match=rf"^weights\.malformed: .*{why}.*\(step: join\)"):
        load_zone(zone, unfit, step="join")
    assert equal(state_of(zone), state(0))


# --- identity --------------------------------------------------------------------------------------------------


def small() -> State:
    return {
        "a": torch.tensor([[1.0, -0.0], [0.5, 3.0]]),
        "b": torch.tensor(7),
        "c": torch.tensor([1, 2], dtype=torch.uint8),
    }


def test_a_change_of_any_single_bit_of_any_tensor_is_another_model() -> None:
    digests = {model_digest(SPEC, small())}
    bits = 0
    for name, value in small().items():
        for bit in range(value.numel() * value.element_size() * 8):
            altered = small()
            altered[name].reshape(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            digests.add(model_digest(SPEC, altered))
            bits += 1
    assert bits == (4 * 4 + 8 + 2) * 8
    assert len(digests) == bits + 1


A = torch.tensor([[1.0, -0.0], [0.5, 3.0]])
VARIANTS: dict[str, tuple[ModelSpec, State]] = {
    "the model": (SPEC, small()),
    "another name": (SPEC, {("d" if k == "a" else k): v for k, v in small().items()}),
    "another name at the same place": (SPEC, {("aa" if k == "a" else k): v for k, v in small().items()}),
    "names exchanged": (SPEC, {{"a": "c", "c": "a"}.get(k, k): v for k, v in small().items()}),
    "another shape": (SPEC, small() | {"a": A.reshape(4)}),
    "another shape of the same rank": (SPEC, small() | {"a": A.reshape(1, 4)}),
    "transposed": (SPEC, small() | {"a": A.T.contiguous()}),
    "the same bytes as another type": (SPEC, small() | {"a": A.view(torch.int32)}),
    "the same numbers as another type": (SPEC, small() | {"a": A.double()}),
    "one tensor less": (SPEC, {k: v for k, v in small().items() if k != "c"}),
    "an empty tensor more": (SPEC, small() | {"d": torch.empty(0)}),
    "nothing": (SPEC, {}),
    "another layer": (ModelSpec(layers=(*SPEC.layers[:2], Linear(units=4))), small()),
    "another activation": (ModelSpec(layers=(*SPEC.layers[:2], Linear(units=3, activation="relu"))), small()),
}


def test_names_shapes_types_and_architecture_are_part_of_the_identity() -> None:
    digests = {name: model_digest(spec, value) for name, (spec, value) in VARIANTS.items()}
    assert len(set(digests.values())) == len(VARIANTS), digests


def test_the_identity_does_not_depend_on_insertion_layout_or_file() -> None:
    module = model()
    ours = state_of(module)
    expected = model_digest(SPEC, ours)
    assert model_digest(SPEC, dict(reversed(ours.items()))) == expected
    lay_out(module, channels_last=True)
    assert model_digest(SPEC, module.state_dict()) == expected
    weight = ours["2.linear.weight"]
    strided = torch.empty(weight.shape[1], weight.shape[0]).T.copy_(weight)
    assert not strided.is_contiguous()
    assert model_digest(SPEC, ours | {"2.linear.weight": strided}) == expected
    every_other = torch.zeros(6)[::2]
    bias = {"2.linear.bias": every_other.copy_(ours["2.linear.bias"])}
    assert not bias["2.linear.bias"].is_contiguous()
    assert model_digest(SPEC, ours | bias) == expected
    assert model_digest(SPEC, decode_state(encode_state(ours), step="test")) == expected
