"""A record's bits in a batch: the same in every place, or refused."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from caltrain.errors import ConfigError
from caltrain.models.network import Network, zone_of
from caltrain.models.places import check_places
from support.exposed import subject
from support.samples import refused


class Placed(nn.Module):
    """Adds something to the record in one place."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        out[self.place] += 1e-6
        return out


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_ordinary_models_are_accepted(rows: int) -> None:
    model = subject()
    check_places(model.module, [model.shape], rows)
    check_places(zone_of(model.module, model.spec, range(2)), [model.shape], rows)


@pytest.mark.parametrize("place", range(4))
def test_a_kernel_that_treats_one_place_otherwise_is_found(place: int) -> None:
    model = subject()
    zone = Network(OrderedDict({"0": Placed(place)}), model.spec.layers, range(1))
    with refused(ConfigError, "model.bits-by-place"):
        check_places(zone, [model.shape], 4)


def test_what_is_drawn_to_look_changes_no_other_draw() -> None:
    model = subject()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check_places(model.module, [model.shape], 4)
    assert torch.equal(torch.rand(1), expected)
