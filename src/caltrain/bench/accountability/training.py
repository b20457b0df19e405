"""Training of the small network, and what it then makes of pictures. One thread, bfloat16 where that is enough."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from caltrain.bench.accountability.network import Network
from caltrain.bench.accountability.scene import Images, Labels, Pool

_LOOK = 256


@dataclass(frozen=True)
class Recipe:
    """How to train; `shift` is how many pixels a picture moves at most."""

    width: int
    epochs: int
    shift: int
    rate: float = 0.1
    batch: int = 64


def recipe_of(pool: Pool) -> Recipe:
    """Pictures in colour get the wider network, and are moved farther; few records are seen more often."""
    times = min(20, 30_000 // len(pool.labels))
    if pool.images.shape[1] == 3:
        return Recipe(width=24, epochs=max(8, times), shift=2)
    return Recipe(width=16, epochs=max(6, times), shift=1)


@dataclass(frozen=True)
class Seen:
    """What a model makes of N pictures: penultimate features (N, D), not of length one, and probabilities (N, C)."""

    features: Tensor
    probabilities: Tensor

    @property
    def predicted(self) -> Tensor:
        """The likeliest class of each (N,)."""
        return self.probabilities.argmax(1)

    def rows(self, chosen: Tensor) -> Seen:
        """Some of them."""
        return Seen(self.features[chosen], self.probabilities[chosen])


def train(images: Images, labels: Labels, classes: int, recipe: Recipe, *, seed: int) -> Network:
    """A network that has learned `labels` from the first weights on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(images.shape[1], classes, width=recipe.width)
    fit(network, images, labels, recipe, seed=seed)
    return network


def fit(
    network: Network, images: Images, labels: Labels, recipe: Recipe, *, seed: int, only: nn.Module | None = None
) -> None:
    """Train on, in place; with `only`, nothing but this part of the network changes."""
    part = only or network
    network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    part.train()
    draws = torch.Generator().manual_seed(seed)
    moving = _Moving(torch.from_numpy(images), recipe)
    known = torch.from_numpy(labels)
    steps = recipe.epochs * max(1, len(labels) // recipe.batch)
    optimiser = torch.optim.SGD(part.parameters(), recipe.rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.rate, total_steps=steps, pct_start=0.25)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=draws)
        for rows in torch.split(order[: max(1, len(order) // recipe.batch) * recipe.batch], recipe.batch):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(network(scaled(moving.batch(rows, draws))), known[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    network.eval()


@torch.no_grad()
def look(network: Network, images: Images | Tensor) -> Seen:
    """What the network makes of pictures (N, C, H, W) uint8, N at least 1."""
    network.eval()
    features, probabilities = [], []
    for part in torch.split(torch.as_tensor(images), _LOOK):
        with torch.autocast("cpu", torch.bfloat16):
            seen = network.embed(scaled(part)).float()
        features.append(seen)
        probabilities.append(network.classify(seen).softmax(1))
    return Seen(torch.cat(features), torch.cat(probabilities))


def outlook(pool: Pool, *, seed: int) -> NDArray[np.float64]:
    """Class probabilities (N, C) of every record by a small model that has not seen it: trained on the other half."""
    recipe = replace(recipe_of(pool), width=16)
    fold = np.random.default_rng(seed).permutation(len(pool.labels)) % 2
    found = np.empty((len(pool.labels), pool.classes))
    for half in (0, 1):
        learned, asked = fold != half, fold == half
        network = train(pool.images[learned], pool.labels[learned], pool.classes, recipe, seed=seed + half)
        found[asked] = look(network, pool.images[asked]).probabilities.numpy()
    return found


def scaled(pictures: Tensor) -> Tensor:
    """Bytes to about -2..2, colours last in memory."""
    return ((pictures.float() - 128) / 64).to(memory_format=torch.channels_last)


class _Moving:
    """Pictures with a margin that mirrors them, so that a batch can be cut out a little beside the middle."""

    def __init__(self, images: Tensor, recipe: Recipe) -> None:
        self.shift = recipe.shift
        self.size = images.shape[2:]
        self.images = F.pad(images.float(), (recipe.shift,) * 4, mode="reflect").to(torch.uint8)

    def batch(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        """Pictures (R, C, H, W) of `rows`, each moved by chance."""
        height, width = self.size
        down, across = torch.randint(0, 2 * self.shift + 1, (2, len(rows), 1), generator=draws)
        lines, columns = torch.arange(height) + down, torch.arange(width) + across
        cut = self.images[rows[:, None, None], :, lines[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2)
