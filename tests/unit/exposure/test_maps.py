"""Feature maps as grey pictures: scaled, resized, numbered."""

from __future__ import annotations

import pytest
import torch

from caltrain.errors import IntegrityError
from caltrain.exposure.correlation import check_ir
from caltrain.exposure.maps import map_count, maps_of
from support.samples import refused


def test_a_map_is_scaled_from_its_least_to_its_largest_value() -> None:
    map_ = torch.tensor([[2.0, 4.0], [3.0, 6.0]])
    grey = maps_of((torch.stack([map_, 100 - map_])[None],), (2, 2))
    assert grey[0, 0].flatten().tolist() == [0, 0.5, 0.25, 1]
    assert grey[0, 1].flatten().tolist() == [1, 0.5, 0.75, 0]


def test_a_map_of_one_value_is_black() -> None:
    assert torch.equal(maps_of((torch.full((2, 3, 4, 4), 7.0),), (5, 5)), torch.zeros(2, 3, 5, 5))


def test_maps_are_resized_between_their_places() -> None:
    grey = maps_of((torch.tensor([[[[0.0, 1.0]]]]),), (2, 4))
    assert grey[0, 0].tolist() == [[0, 0.25, 0.75, 1]] * 2


def test_a_tensor_without_places_is_one_square_map() -> None:
    vector = torch.tensor([[3.0, 1.0, 5.0, 2.0, 4.0]])
    for tensor in (vector, vector[:, :, None, None]):
        grey = maps_of((tensor,), (3, 3))
        assert grey.shape == (1, 1, 3, 3)
        assert grey.flatten().tolist() == [0.5, 0, 1, 0.25, 0.75, 0, 0, 0, 0]


def test_tokens_are_maps_over_their_places() -> None:
    tokens = torch.rand(2, 9, 4)
    whole = maps_of((tokens.transpose(1, 2).reshape(2, 4, 3, 3),), (3, 3))
    assert torch.equal(maps_of((tokens,), (3, 3)), whole)


def test_maps_are_numbered_through_the_tensors() -> None:
    live = (torch.rand(2, 3, 4, 4), torch.rand(2, 7), torch.rand(2, 5, 2, 2))
    every = maps_of(live, (4, 4))
    assert every.shape[1] == map_count(live) == 9
    wanted = torch.tensor([1, 3, 4, 8])
    assert torch.equal(maps_of(live, (4, 4), wanted), every[:, wanted])
    assert torch.equal(maps_of(live, (4, 4), wanted.flip(0)), every[:, wanted])


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 6), (4, 9, 2)])
def test_what_differs_nowhere_is_refused(shape: tuple[int, ...]) -> None:
    channels = torch.arange(shape[-1] if len(shape) != 4 else shape[1]).float()
    constant = channels[:, None, None].expand(shape) if len(shape) == 4 else channels.expand(shape)
    with refused(IntegrityError, "exposure.constant-ir"):
        check_ir((constant, torch.zeros(4, 2)))
    for input_, place in ((2, 0), (0, -1)):
        varied = constant.clone()
        varied[(input_, *([place] * (len(shape) - 1)))] += 1
        check_ir((constant, varied))


def test_maps_of_one_tensor_alone_can_be_wanted() -> None:
    first, second = torch.rand(3, 2, 4, 4), torch.rand(3, 5, 4, 4)
    every = maps_of((first, second), (8, 8))
    for number in (1, 4):
        found = maps_of((first, second), (8, 8), torch.tensor([number]))
        assert torch.equal(found, every[:, number : number + 1])
