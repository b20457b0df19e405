"""Distances in a network's features: 0 for the same, larger for what looks less alike, for networks of any kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.exposure.perceptual import Perceptual, edge_distance
from caltrain.exposure.subject import Subject, subject_from
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec
from caltrain.models.zoo import mlp
from caltrain.records.schema import DataSchema
from support.networks import CLASSES, SMALL


def _subject(name: str) -> Subject:
    small = SMALL[name]
    spec = small.make()
    torch.manual_seed(0)
    module = build(spec, input_shape=small.shape)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return subject_from(spec, small.schema, module, digest="sha256:" + "0" * 64)


def _pictures(count: int = 6, shape: tuple[int, int, int] = (3, 16, 16)) -> Tensor:
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["18-layer", "resnet18", "vit"])
def test_distance_in_features(name: str) -> None:
    distance = Perceptual(_subject(name))
    assert 3 <= len(distance.fronts) <= 5
    assert distance.fronts == sorted(set(distance.fronts))
    a = _pictures()
    assert distance(a, a).tolist() == pytest.approx([0] * 6, abs=1e-6)
    near, far = distance(a, (a + 0.05 * _pictures().flip(0)).clamp(0, 1)), distance(a, a.flip(0))
    assert bool((near > 0).all())
    assert bool((near < far).all())
    assert float(far.max()) <= 4
    assert torch.allclose(distance(a, a.flip(0)), distance(a.flip(0), a), atol=1e-6)


def test_distance_is_that_of_unit_features_at_the_layers() -> None:
    """By running every chosen part of a plain network from the start."""
    subject = _subject("18-layer")
    distance = Perceptual(subject)
    a, b = _pictures(shape=(3, 12, 12)).chunk(2)
    layers, total = list(subject.module.children()), torch.zeros(3)
    for front in distance.fronts:
        part = torch.nn.Sequential(*layers[:front])
        one, other = (part(subject.inputs(t)) for t in (a, b))
        one, other = one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
        total += torch.nan_to_num(one - other).square().sum(1).mean((1, 2)) / len(distance.fronts)
    assert distance(a, b).tolist() == pytest.approx(total.tolist(), abs=1e-5)


def test_pictures_of_another_size_and_kind_are_fitted_to_the_network() -> None:
    distance = Perceptual(_subject("resnet18"))
    grey = _pictures(shape=(1, 28, 28))
    colour = grey.expand(-1, 3, -1, -1)
    found = distance(grey, grey.flip(0))
    assert torch.allclose(found, distance(colour, colour.flip(0)), atol=1e-5)
    assert bool((found > 0).all())


def test_more_pictures_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    distance, a = Perceptual(_subject("18-layer")), _pictures(5)
    whole = distance(a, a.flip(0))
    monkeypatch.setattr("caltrain.exposure.perceptual._BATCH", 2)
    assert torch.allclose(distance(a, a.flip(0)), whole, atol=1e-6)


def test_a_network_without_places_is_refused() -> None:
    spec: ModelSpec = mlp(CLASSES, hidden=(8, 8))
    names = tuple(f"class {i}" for i in range(CLASSES))
    schema = DataSchema(shape=(1, 1, 20), classes=names, mean=(0.5,), std=(0.25,))
    module = build(spec, input_shape=(1, 1, 20))
    with pytest.raises(ConfigError) as refused:
        Perceptual(subject_from(spec, schema, module, digest=""))
    assert refused.value.code == "exposure.no-places"


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 28, 28), (1, 1, 20), (1, 3, 5)])
def test_edges_need_no_network(shape: tuple[int, int, int]) -> None:
    a = _pictures(shape=shape)
    assert edge_distance(a, a).tolist() == pytest.approx([0] * 6, abs=1e-6)
    far = edge_distance(a, a.flip(0))
    assert bool(((far > 0) & (far <= 1)).all())
    assert torch.allclose(far, edge_distance(a.flip(0), a))
    assert edge_distance(a, (a + 0.1)).tolist() == pytest.approx([0] * 6, abs=1e-4)  # brightness is no edge


def test_edges_of_three_scales_count() -> None:
    """A step of one pixel's width is gone at the coarser scales, a wide one is not."""
    flat, fine, coarse = (torch.zeros(1, 1, 16, 16) for _ in range(3))
    fine[..., ::2] = 1
    coarse[..., 8:] = 1
    assert float(edge_distance(flat, fine)) < 0.4
    assert float(edge_distance(fine, coarse)) > float(edge_distance(flat, fine))
