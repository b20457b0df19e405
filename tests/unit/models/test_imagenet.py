"""The papers' ImageNet networks are, layer by layer, those of Darknet's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caltrain.models.darknet import read_cfg
from caltrain.models.imagenet import CLASSES, NETWORKS, RECORD
from caltrain.models.layers import Conv, Linear
from caltrain.models.spec import layer_shapes

FOLDER = Path(os.environ.get("CALTRAIN_DATA", Path(__file__).parents[4] / "shared" / "data")) / "darknet_cfg"


@pytest.mark.data
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_that_of_its_file(name: str) -> None:
    file = FOLDER / f"{name}.cfg"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    read = read_cfg(file.read_bytes())
    assert read.model == NETWORKS[name]()
    assert (read.record, read.classes) == (RECORD[name], CLASSES)


@pytest.mark.parametrize(("name", "weighted"), [("darknet", 8), ("extraction", 21), ("densenet201", 201)])
def test_a_network_gives_a_thousand_scores_and_has_as_many_layers_with_weights_as_it_is_known_for(
    name: str, weighted: int
) -> None:
    spec = NETWORKS[name]()
    assert layer_shapes(spec, RECORD[name])[-1] == (CLASSES,)
    assert sum(isinstance(layer, Conv | Linear) for layer in spec.layers) == weighted
