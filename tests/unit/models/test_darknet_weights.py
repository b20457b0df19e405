"""Darknet's weight files: what is read computes what Darknet computes, and any other bytes are refused by name."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from caltrain.errors import CaltrainError, ConfigError, IntegrityError
from caltrain.models.darknet_weights import read_weights
from caltrain.models.layers import AvgPool, Conv, Flatten, Linear
from caltrain.models.network import Network, build
from caltrain.models.spec import ModelSpec
from caltrain.models.weights import load_zone
from support.darknet_file import HEAD, Parts, drawn_parts, forward, weights_file
from support.networks import cfg
from support.samples import quick, refused

RECORD = (2, 7, 6)
SPEC = ModelSpec(
    layers=(
        Conv(filters=5, stride=2, batch_norm=True, activation="leaky"),
        Conv(filters=3, kernel=1, padding=0, activation="none"),
        Flatten(),
        Linear(units=4),
    )
)
PARTS = drawn_parts(SPEC, RECORD)
FLOATS = [5 * 4 + 5 * 2 * 9, 3 + 3 * 5, 0, 4 + 4 * 3 * 4 * 3]


def loaded(spec: ModelSpec, record: tuple[int, int, int], state: dict[str, Tensor]) -> Network:
    module = build(spec, input_shape=record)
    load_zone(module, state, step="test")
    return module.eval()


def same_as_darknet(layers: list[Parts], raw: bytes) -> None:
    x = np.random.default_rng(1).uniform(0, 1, RECORD)
    with torch.inference_mode():
        found = loaded(SPEC, RECORD, read_weights(raw, SPEC, RECORD))(torch.from_numpy(x).float()[None])[0]
    np.testing.assert_allclose(found.numpy(), forward(SPEC, layers, x), rtol=1e-4, atol=1e-5)


def test_the_logits_are_those_of_darknets_formulas() -> None:
    same_as_darknet(PARTS, weights_file(PARTS))


@pytest.mark.parametrize("variance", [0.0, 1e-12, 4e-6, 9.9e-6, 1e-5, 1e-3])
def test_so_they_are_where_the_two_ways_to_divide_differ_most(variance: float) -> None:
    first = PARTS[0] | {
        "variance": np.full(5, variance, dtype="<f4"),
        "scales": PARTS[0]["scales"] * np.float32(variance**0.5 + 1e-6),
    }
    layers = [first, *PARTS[1:]]
    same_as_darknet(layers, weights_file(layers))
    assert float(read_weights(weights_file(layers), SPEC, RECORD)["0.norm.running_var"].min()) >= 0


HEADS = {
    "0.1 counts in 32 bits": struct.pack("<3ii", 0, 1, 0, 7),
    "0.2 counts in 64": struct.pack("<3iQ", 0, 2, 0, 7),
    "1.0 counts in 64": struct.pack("<3iQ", 1, 0, 0, 7),
    "1000 is not transposed": struct.pack("<3ii", 0, 1000, 0, 7),
    "a negative version": struct.pack("<3ii", -1, 5, 0, 7),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_that_darknet_reads_is_read(head: bytes) -> None:
    same_as_darknet(PARTS, weights_file(PARTS, head))


@pytest.mark.parametrize("head", [struct.pack("<3ii", 0, 1001, 0, 7), struct.pack("<3ii", 1001, 2, 0, 7)])
def test_connected_layers_of_old_files_are_transposed(head: bytes) -> None:
    turned = [*PARTS[:-1], PARTS[-1] | {"weights": np.ascontiguousarray(PARTS[-1]["weights"].T)}]
    same_as_darknet(PARTS, weights_file(turned, head))


def test_where_an_old_files_order_is_not_known_it_is_refused() -> None:
    spec = ModelSpec(layers=(Conv(filters=3), AvgPool(), Linear(units=4)))
    parts = drawn_parts(spec, RECORD)
    assert read_weights(weights_file(parts), spec, RECORD)
    with refused(IntegrityError, "weights.darknet-order"):
        read_weights(weights_file(parts, struct.pack("<3ii", 0, 1001, 0, 7)), spec, RECORD)


def test_a_path_gives_the_state_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "net.weights"
    path.write_bytes(weights_file(PARTS))
    ours, theirs = read_weights(path, SPEC, RECORD), read_weights(weights_file(PARTS), SPEC, RECORD)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for absent in (tmp_path, tmp_path / "none"):
        with refused(ConfigError, "weights.darknet-file"):
            read_weights(absent, SPEC, RECORD)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.weights"
    path.write_bytes(weights_file(PARTS))

    def shrinks(size: int, counts: list[int]) -> None:
        assert size == 4 * sum(counts)
        os.truncate(path, path.stat().st_size - 2)

    monkeypatch.setattr("caltrain.models.darknet_weights._check_size", shrinks)
    with refused(IntegrityError, "weights.darknet-size"):
        read_weights(path, SPEC, RECORD)


# --- the published networks -------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("name", ["cifar", "darknet", "extraction", "densenet201"])
def test_each_published_network_is_read_layer_by_layer(name: str) -> None:
    found = cfg(name)
    parts = drawn_parts(found.model, found.record)
    state = read_weights(weights_file(parts), found.model, found.record)
    counters = sum("num_batches" in name for name in state)
    assert len(state) - counters == sum(map(len, parts))
    for i, own in enumerate(parts):
        kind = "linear" if isinstance(found.model.layers[i], Linear) else "conv"
        ours = {"weights": f"{kind}.weight", "biases": "norm.bias" if "mean" in own else f"{kind}.bias"}
        for part, value in own.items():
            name_of = ours | {"scales": "norm.weight", "mean": "norm.running_mean", "variance": "norm.running_var"}
            tensor = state[f"{i}.{name_of[part]}"].numpy()
            np.testing.assert_allclose(tensor, value, rtol=0 if part != "variance" else 1e-4)


@pytest.mark.data
def test_a_file_of_first_layers_says_where_it_ends() -> None:
    found = cfg("darknet53")
    parts = drawn_parts(found.model, found.record)
    with refused(IntegrityError, "weights.darknet-size") as caught:
        read_weights(weights_file(parts[:-1]), found.model, found.record)
    assert "it ends before layer 76, as a file of first layers alone does (like darknet53.conv.74)" in caught.value.what


# --- other bytes -------------------------------------------------------------------------------------------------

SOUND = weights_file(PARTS)
SIZES = {
    "nothing": (b"", "0 bytes are no head"),
    "half a head": (HEAD[:15], "15 bytes are no head"),
    "a head alone": (HEAD, f"has 0 floats after its head, the network {sum(FLOATS)}: it ends before layer 0"),
    "a head cut short": (HEAD[:17], "-0.75 floats after its head"),
    "a layer less": (SOUND[: 20 + 4 * sum(FLOATS[:2])], "it ends before layer 3, as a file of first layers"),
    "half a layer": (SOUND[: 20 + 4 * FLOATS[0] + 40], "it ends inside layer 1"),
    "a byte less": (SOUND[:-1], f"has {sum(FLOATS) - 0.25} floats after its head, .* it ends inside layer 3"),
    "a float more": (SOUND + bytes(4), f"has {sum(FLOATS) + 1} floats after its head, the network {sum(FLOATS)}$"),
    "a byte more": (SOUND + b"x", "has [0-9.]+25 floats"),
}


@pytest.mark.parametrize(("raw", "why"), SIZES.values(), ids=SIZES)
def test_a_file_of_another_size_is_refused_with_both_numbers(raw: bytes, why: str) -> None:
    with refused(IntegrityError, "weights.darknet-size") as caught:
        read_weights(raw, SPEC, RECORD)
    assert re.search(why, caught.value.what), caught.value.what


def test_a_giant_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse.weights"
    with path.open("wb") as file:
        file.write(HEAD)
        os.truncate(file.fileno(), 1 << 40)
    with refused(IntegrityError, "weights.darknet-size"):
        read_weights(path, SPEC, RECORD)


@pytest.mark.parametrize(("part", "value"), [(p, v) for p in PARTS[0] for v in (np.nan, np.inf)] + [("variance", -1.0)])
def test_what_is_not_finite_is_refused(part: str, value: float) -> None:
    spoilt = PARTS[0][part].copy()
    spoilt.flat[-1] = value
    with refused(IntegrityError, "weights.malformed"):
        read_weights(weights_file([PARTS[0] | {part: spoilt}, *PARTS[1:]]), SPEC, RECORD)


@quick
@given(
    st.binary(max_size=40)
    | st.tuples(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=8)).map(
        lambda change: SOUND[: change[0]] + change[1] + SOUND[change[0] + len(change[1]) :]
    )
    | st.integers(0, len(SOUND)).map(lambda end: SOUND[:end])
)
def test_any_bytes_give_a_state_or_a_named_error(raw: bytes) -> None:
    try:
        state = read_weights(raw, SPEC, RECORD)
    except CaltrainError:
        return
    loaded(SPEC, RECORD, state)
