"""A model under assessment: its pictures, its cuts, and what crosses at them."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from caltrain.errors import ConfigError, DataError, IntegrityError
from caltrain.exposure.subject import Cut, candidate_cuts, check_front, stacked, subject_of
from caltrain.models.layers import AvgPool, Conv, Flatten, Linear, MaxPool, Route, Shortcut
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec, embedding_layer, layer_shapes, live_at
from caltrain.models.weights import model_digest, state_of
from caltrain.models.zoo import cifar_10_layer, cifar_18_layer, resnet9_28, resnet18_32, vit_small_32
from caltrain.records.schema import DataSchema
from caltrain.training.batches import center_crop, normalise
from support.exposed import TINY, TINY_DATA, drawn, subject
from support.networks import SMALL
from support.samples import refused

NAMES = [name for name in SMALL if name not in {"darknet", "extraction", "densenet201", "mlp"}]
FLOATS = msgspec.structs.replace(TINY_DATA, dtype="f32", mean=(2.0,), std=(0.5,))


def records(data: DataSchema, count: int = 5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if data.dtype == "u8":
        return torch.randint(0, 256, (count, *data.shape), dtype=torch.uint8, generator=generator)
    return torch.randn((count, *data.shape), generator=generator) * 0.4 + 2


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [TINY_DATA, FLOATS], ids=["u8", "f32"])
def test_pictures_become_the_inputs_that_training_makes_of_the_records(data: DataSchema) -> None:
    of, elements = drawn(TINY, data), records(data)
    pictures = of.pictures(elements)
    assert (pictures.shape, pictures.dtype) == ((5, 1, 8, 8), torch.float32)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1
    expected = normalise(center_crop(elements, TINY.size), data, channels_last=True)
    torch.testing.assert_close(of.inputs(pictures), expected)


def test_bytes_are_pictures_of_0_to_1() -> None:
    elements = torch.arange(100, dtype=torch.uint8).reshape(1, 1, 10, 10) + 100
    assert torch.equal(subject().pictures(elements), center_crop(elements, (8, 8)) / 255)


def test_floats_far_from_all_others_are_cut_off() -> None:
    far = records(FLOATS)
    far[0, 0, 5, 5], far[1, 0, 5, 5] = 1e9, -1e9
    pictures = drawn(TINY, FLOATS).pictures(far)
    assert (float(pictures[0, 0, 4, 4]), float(pictures[1, 0, 4, 4])) == (1.0, 0.0)


def test_a_gradient_reaches_the_pictures() -> None:
    pictures = torch.rand(2, 1, 8, 8, requires_grad=True)
    Cut(subject(), 3).ir(pictures)[0].square().sum().backward()  # type: ignore[no-untyped-call]
    assert pictures.grad is not None
    assert float(pictures.grad.abs().sum()) > 0


OTHER = {
    "another size": torch.zeros(3, 1, 8, 8, dtype=torch.uint8),
    "other channels": torch.zeros(3, 3, 10, 10, dtype=torch.uint8),
    "another type": torch.zeros(3, 1, 10, 10),
    "one record": torch.zeros(1, 10, 10, dtype=torch.uint8),
    "none": torch.zeros(0, 1, 10, 10, dtype=torch.uint8),
}


@pytest.mark.parametrize("case", OTHER)
def test_records_of_another_schema_are_refused(case: str) -> None:
    with refused(DataError, "exposure.schema"):
        subject().pictures(OTHER[case])


# --- the model ---------------------------------------------------------------------------------------------------


def test_a_subject_infers_and_takes_no_gradients() -> None:
    module = subject().module
    assert not any(child.training for child in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_subject_is_named_by_its_weights() -> None:
    of = subject(seed=1)
    assert of.digest == model_digest(of.spec, state_of(of.module)) != subject(seed=2).digest


def test_a_model_that_does_not_fit_its_schema_is_refused() -> None:
    state = state_of(subject().module)
    with refused(ConfigError, "model.classes"):
        subject_of(TINY, msgspec.structs.replace(TINY_DATA, classes=("a", "b")), state)
    with refused(DataError, "schema.normalisation"):
        subject_of(TINY, msgspec.structs.replace(TINY_DATA, std=(0.0,)), state)
    with refused(IntegrityError, "weights.malformed"):
        subject_of(TINY, TINY_DATA, state | {"0.conv.bias": torch.full((8,), torch.nan)})


# --- cuts --------------------------------------------------------------------------------------------------------

CUTS = {
    "18-layer": (cifar_18_layer(), 14),
    "10-layer": (cifar_10_layer(), 6),
    "resnet18": (resnet18_32(), 32),
    "resnet9": (resnet9_28(), 14),
    "vit": (vit_small_32(), 9),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_model_can_be_cut_anywhere_before_its_last_layer_with_weights(name: str) -> None:
    spec, last = CUTS[name]
    assert embedding_layer(spec) == last
    assert candidate_cuts(spec) == tuple(range(1, last + 1))
    for front in candidate_cuts(spec):
        check_front(spec, front)
        assert -1 not in live_at(spec.layers, front)


def test_no_cut_lets_the_records_themselves_cross() -> None:
    residual = ModelSpec(layers=(Conv(filters=1), Conv(filters=1), Shortcut(source=-1), Flatten(), Linear(units=4)))
    assert candidate_cuts(residual) == (3, 4)


def test_a_frontnet_without_weights_is_none() -> None:
    spec = ModelSpec(layers=(MaxPool(), Flatten(), Linear(units=4), Route(sources=(2,)), Linear(units=4)))
    assert candidate_cuts(spec) == (3, 4)


@pytest.mark.parametrize("front", [-1, 0, 15, 16, 17, 999])
def test_a_cut_that_cannot_be_is_refused_with_those_that_can(front: int) -> None:
    of = subject("18-layer")
    for attempt in (lambda: check_front(of.spec, front), lambda: Cut(of, front)):
        with refused(ConfigError, "exposure.cut") as caught:
            attempt()
        assert "1, 2, 3" in caught.value.fix


def test_a_model_without_a_cut_is_refused() -> None:
    with refused(ConfigError, "exposure.no-cuts"):
        candidate_cuts(ModelSpec(layers=(Conv(filters=4), AvgPool())))


# --- what crosses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_at_every_cut_both_sides_together_are_the_model_bit_for_bit(name: str) -> None:
    of = subject(name)
    pictures = of.pictures(records(of.data, 3))
    shapes = layer_shapes(of.spec, of.data.shape)
    whole = of.logits(pictures)
    for front in candidate_cuts(of.spec):
        cut = Cut(of, front)
        live = cut.ir(pictures)
        assert [tuple(t.shape[1:]) for t in live] == [shapes[i + 1] for i in live_at(of.spec.layers, front)]
        assert torch.equal(cut.answer(live), whole), front
        one = cut.stacked(pictures)
        assert one.dim() == 4
        assert one.shape[:2] == (3, sum(t.shape[2] if t.dim() == 3 else t.shape[1] for t in live))


def test_the_whole_is_what_the_plain_module_gives() -> None:
    of = subject("resnet18")
    elements = records(of.data, 3)
    plain = build(of.spec, input_shape=of.data.shape).eval()
    plain.load_state_dict(of.module.state_dict())
    with torch.inference_mode():
        expected = plain(normalise(elements, of.data, channels_last=False))
    torch.testing.assert_close(of.logits(of.pictures(elements)), expected, rtol=1e-4, atol=1e-5)


def test_a_defence_changes_what_crosses() -> None:
    of, pictures = subject(), torch.rand(3, 1, 8, 8)
    doubled = Cut(of, 2, lambda live: tuple(2 * t for t in live))
    assert torch.equal(doubled.ir(pictures)[0], 2 * Cut(of, 2).ir(pictures)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    cut = Cut(subject(), 2, lambda live: (*live, torch.full((3, 1), value)))
    with refused(IntegrityError, "exposure.not-finite"):
        cut.ir(torch.rand(3, 1, 8, 8))


def test_several_tensors_become_planes_of_the_largest_size() -> None:
    image, small, vector = torch.rand(2, 3, 4, 6), torch.rand(2, 1, 2, 3), torch.rand(2, 5)
    one = stacked((image, small, vector))
    assert one.shape == (2, 3 + 1 + 5, 4, 6)
    assert torch.equal(one[:, :3], image)
    assert torch.equal(one[:, 3, ::2, ::2], small[:, 0])
    assert torch.equal(one[:, 4:], vector[:, :, None, None].expand(2, 5, 4, 6))


@pytest.mark.parametrize(("tokens", "plane"), [(9, (3, 3)), (6, (6, 1)), (1, (1, 1))])
def test_tokens_become_planes_in_their_order(tokens: int, plane: tuple[int, int]) -> None:
    live = torch.rand(2, tokens, 5)
    one = stacked((live,))
    assert one.shape == (2, 5, *plane)
    assert torch.equal(one.flatten(2), live.transpose(1, 2))
