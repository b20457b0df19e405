"""A pool of drawn pictures, and runs that are put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from caltrain.bench.accountability.making import Made
from caltrain.bench.accountability.network import Network
from caltrain.bench.accountability.scene import Images, Labels, Pool, Scene, fresh
from caltrain.bench.accountability.training import Seen

CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the grid: two threads that wait for one another are slow where others compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(count: int, seed: int) -> tuple[Images, Labels]:
    """Pictures (n, 1, 12, 12) with a bright quarter for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % CLASSES)
    images = rng.integers(0, 80, (count, 1, 12, 12)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 6 * (label // 2), 6 * (label % 2)
        image[:, top : top + 5, left : left + 5] += 120
    return images, labels.astype(np.int64)


@pytest.fixture(scope="session")
def pool() -> Pool:
    """400 records, 120 test pictures, 24 spare ones."""
    parts = [drawn(count, seed) for seed, count in enumerate((400, 120, 24))]
    (images, labels), (test_images, test_labels), (spare_images, spare_labels) = parts
    return Pool("drawn", images, labels, test_images, test_labels, spare_images, spare_labels, CLASSES)


@pytest.fixture
def scene(pool: Pool) -> Scene:
    """Nobody has done anything."""
    return fresh(pool, rng=np.random.default_rng(0))


@pytest.fixture(scope="session")
def run_of() -> Callable[[Scene], Made]:
    """What a scene's run would be, without training."""
    return _run_of


def _run_of(scene: Scene) -> Made:
    """Features say the given label, poison has a direction of its own, and so have five triggered queries."""
    triggered = bool(scene.triggers)
    labels = torch.from_numpy(scene.labels)
    draws = torch.Generator().manual_seed(0)
    features = torch.eye(CLASSES + 1)[labels] + 0.05 * torch.rand((len(labels), CLASSES + 1), generator=draws)
    features[torch.from_numpy(scene.poisoned), CLASSES] += 3
    tests = torch.eye(CLASSES + 1)[torch.from_numpy(scene.pool.test_labels)]
    asked = torch.zeros((5, CLASSES + 1))
    asked[:, CLASSES] = 3
    target = scene.triggers[0].target if triggered else 0
    return Made(
        scene=scene,
        network=Network(1, CLASSES, width=4),
        records=Seen(features, torch.softmax(4 * features[:, :CLASSES], 1)),
        tests=Seen(tests, torch.softmax(4 * tests[:, :CLASSES], 1)),
        triggered=(Seen(asked, torch.eye(CLASSES)[[target] * 5]),) if triggered else (),
        asked=(torch.arange(5),) if triggered else (),
        accuracy=1.0,
        success=1.0 if triggered else None,
        seconds=0.0,
    )
