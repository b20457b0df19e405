"""Numbers at a cut: as they are, as bfloat16, or as int8 with a scale for each record."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from caltrain.errors import ProtocolError
from caltrain.serving.package import Across
from caltrain.serving.precision import narrow, widen
from support.samples import quick, refused

ALL: tuple[Across, ...] = get_args(Across)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def back(x: Tensor, across: Across) -> Tensor:
    (wide,) = widen(narrow([x], across), across)
    return wide


def test_f32_crosses_as_it_is() -> None:
    x = some(3, 4)
    assert narrow([x], "f32")[0] is x
    assert widen([x], "f32")[0] is x


def test_bf16_rounds_to_eight_bits_of_mantissa() -> None:
    x = some(3, 4, 5)
    assert torch.equal(back(x, "bf16"), x.bfloat16().float())


@quick
@given(st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 99), st.floats(1e-20, 1e20))
def test_int8_is_off_by_half_a_step_of_its_record_at_most(rows: int, shape: list[int], seed: int, size: float) -> None:
    x = some(rows, *shape, seed=seed) * size
    largest = x.flatten(1).abs().amax(1) if shape else x.abs()
    apart = (back(x, "int8") - x).flatten(1).abs().amax(1) if shape else (back(x, "int8") - x).abs()
    assert bool((apart <= largest / 254 * 1.0001).all())


@pytest.mark.parametrize("across", ALL)
def test_a_records_numbers_do_not_depend_on_the_others(across: Across) -> None:
    x = some(3, 2, 4, 4)
    x[1] *= 1e6
    alone = torch.cat([back(row[None], across) for row in x])
    assert torch.equal(back(x, across), alone)


@pytest.mark.parametrize("across", ALL)
def test_zeros_stay_zeros(across: Across) -> None:
    assert torch.equal(back(torch.zeros(2, 3), across), torch.zeros(2, 3))


@pytest.mark.parametrize("across", ALL)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_become_so(across: Across, value: float) -> None:
    x = some(2, 3)
    x[1, 1] = value
    assert [bool(row.isfinite().all()) for row in back(x, across)] == [True, False]


@pytest.mark.parametrize("across", ALL)
def test_the_memory_layout_stays(across: Across) -> None:
    x = some(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert narrow([x], across)[0].stride() == back(x, across).stride() == x.stride()


@pytest.mark.parametrize("across", ALL)
def test_several_tensors_keep_their_order(across: Across) -> None:
    live = [some(2, 3, 4, 4), some(2, 5, seed=1), some(2, seed=2)]
    wide = widen(narrow(live, across), across)
    assert [x.shape for x in wide] == [x.shape for x in live]
    assert all(float((a - b).abs().max()) < 0.05 for a, b in zip(live, wide, strict=True))


X = torch.zeros(2, 3)
SCALES = torch.ones(2)
WRONG: dict[str, tuple[Across, list[Tensor]]] = {
    "bf16 for f32": ("f32", [X.bfloat16()]),
    "f64 for f32": ("f32", [X.double()]),
    "f32 for bf16": ("bf16", [X]),
    "f32 for int8": ("int8", [X, SCALES]),
    "int8 without scales": ("int8", [X.to(torch.int8)]),
    "scales of bf16": ("int8", [X.to(torch.int8), SCALES.bfloat16()]),
    "a scale too many": ("int8", [X.to(torch.int8), torch.ones(3)]),
    "scales in a table": ("int8", [X.to(torch.int8), torch.ones(2, 1)]),
    "a number for a batch": ("int8", [torch.zeros((), dtype=torch.int8), torch.ones(())]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_narrow_does_not_give_is_refused(wrong: str) -> None:
    across, tensors = WRONG[wrong]
    with refused(ProtocolError, "tensor.malformed"):
        widen(tensors, across)
