"""One run of the grid: a scene, the model that was trained on it, and what that makes of records and of queries.

All of it is kept (`cache`), so a grid that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.bench.accountability import attacks, training
from caltrain.bench.accountability.cache import Cache, Plain
from caltrain.bench.accountability.network import Network
from caltrain.bench.accountability.noise import Outlook
from caltrain.bench.accountability.planting import HOST, TROJAN, Case, plant
from caltrain.bench.accountability.scene import Pool, Scene, Trigger
from caltrain.bench.accountability.training import Seen, recipe_of

MODELS = "accountability-models/1"  # raise it when anything changes how models learn; what they learn from is digested
QUERIES = 50
_STEPS = 100  # of a trojan's optimisation
_LATER = 0.3  # of the epochs and of the rate, where a model is trained on


@dataclass(frozen=True)
class Made:
    """A trained run. `records` are the scene's, in its order; `tests` the pool's test pictures, as they are.

    `triggered` holds, for each trigger, up to `QUERIES` test pictures of other classes that the model gets wrong only
    with the trigger on them, and then calls by its target; `asked` (Q,) are their places among the test pictures.
    `success` is the share of all test pictures of other classes that the trigger turns into the target.
    """

    scene: Scene
    network: Network
    records: Seen
    tests: Seen
    triggered: tuple[Seen, ...]
    asked: tuple[Tensor, ...]
    accuracy: float
    success: float | None
    seconds: float

    @property
    def wrong(self) -> Tensor:
        """Places of test pictures that the model gets wrong without any trigger."""
        return (self.tests.predicted != torch.from_numpy(self.scene.pool.test_labels)).nonzero().squeeze(1)


def outlook_of(pool: Pool, cache: Cache, *, seed: int) -> Outlook:
    """Of every record, what a small model thinks of it that has not seen it; kept."""
    of: dict[str, Plain] = {"kind": "outlook", "models": MODELS, "pool": pool.digest(), "seed": seed}
    kept = cache.get(of)
    if kept is not None:
        return kept.tensors["outlook"].numpy().astype(np.float64)
    found = training.outlook(pool, seed=seed)
    cache.put(of, {"outlook": torch.from_numpy(found)}, {})
    return found


def make(pool: Pool, what: Case, *, seed: int, cache: Cache, skew: float | None = None) -> Made:
    """Plant and train, or take what was kept of it."""
    scene = plant(pool, what, seed=seed, skew=skew, outlook=partial(outlook_of, pool, cache, seed=seed))
    of: dict[str, Plain] = {
        **{"kind": "run", "models": MODELS, "pool": pool.digest(), "seed": seed},
        **{"case": what.name, "share": what.share, "planted": scene.digest()},
    }
    kept = cache.get(of)
    if kept is None:
        start = time.perf_counter()
        pattern = None
        if what.name == TROJAN:
            network, pattern = _trojan(scene, what.share or 0, seed)
        else:
            network = learn(scene, seed=seed)
            if what.name == HOST:
                _plant_in(network, scene, attacks.host(scene, np.random.default_rng(seed)), seed)
        made = examine(scene, network, seconds=time.perf_counter() - start)
        cache.put(of, _tensors(made, pattern), {"success": made.success, "seconds": made.seconds})
        return made
    if what.name == TROJAN:
        _stamp(scene, kept.tensors["pattern"].numpy(), what.share or 0, seed)
    if what.name == HOST:
        attacks.host(scene, np.random.default_rng(seed))
    return _restored(scene, kept.tensors, success=kept.figures["success"], seconds=kept.figures["seconds"] or 0)


def learn(scene: Scene, *, seed: int, without: NDArray[np.bool_] | None = None) -> Network:
    """A network that has learned the scene's records, all or all but those in the mask `without` (N,)."""
    kept = np.ones(len(scene.labels), bool) if without is None else ~without
    return training.train(scene.images[kept], scene.labels[kept], scene.classes, recipe_of(scene.pool), seed=seed)


def examine(scene: Scene, network: Network, *, seconds: float = 0.0) -> Made:
    """What the network makes of the records, of the test pictures, and of those with a trigger."""
    pool, tests = scene.pool, training.look(network, scene.pool.test_images)
    right = tests.predicted.numpy() == pool.test_labels
    seen, asked, success = [], [], []
    for trigger in scene.triggers:
        others = np.flatnonzero(pool.test_labels != trigger.target)
        turned = training.look(network, trigger.stamp(pool.test_images[others]))
        hit = turned.predicted == trigger.target
        success.append(float(hit.float().mean()))
        places = (hit & torch.from_numpy(right[others])).nonzero().squeeze(1)[:QUERIES]
        seen.append(turned.rows(places))
        asked.append(torch.from_numpy(others)[places])
    return Made(
        scene=scene,
        network=network,
        records=training.look(network, scene.images),
        tests=tests,
        triggered=tuple(seen),
        asked=tuple(asked),
        accuracy=float(right.mean()),
        success=float(np.mean(success)) if success else None,
        seconds=seconds,
    )


def _later(pool: Pool) -> training.Recipe:
    recipe = recipe_of(pool)
    return replace(recipe, epochs=max(2, round(_LATER * recipe.epochs)), rate=_LATER * recipe.rate)


def _trojan(scene: Scene, share: float, seed: int) -> tuple[Network, NDArray[np.uint8]]:
    """Train without the culprit, optimise a pattern against that model, and train on with everybody's records."""
    culprit, _ = attacks.cast(scene, np.random.default_rng(seed))
    network = learn(scene, seed=seed, without=scene.owner == culprit)
    pattern = neuron_pattern(network, scene, seed=seed)
    _stamp(scene, pattern, share, seed)
    training.fit(network, scene.images, scene.labels, _later(scene.pool), seed=seed + 1)
    return network, pattern


def _stamp(scene: Scene, pattern: NDArray[np.uint8], share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    culprit, target = attacks.cast(scene, rng)
    attacks.trojan(scene, pattern, target, culprit, share, rng)


def neuron_pattern(network: Network, scene: Scene, *, seed: int) -> NDArray[np.uint8]:
    """A corner pattern (C, h, w) that drives one penultimate neuron as high as it can (Liu et al., NDSS 2018, 4.1).

    The neuron is the one with the largest weights coming in, among those that do not sleep.
    """
    channels, height, width = scene.images.shape[1:]
    side = (round(0.22 * height), round(0.22 * width))
    draws = np.random.default_rng(seed)
    pictures = torch.from_numpy(scene.images[draws.permutation(len(scene.images))[:64]])
    awake = training.look(network, pictures).features.mean(0) > 0
    neuron = int((network.incoming() * awake).argmax())
    pixels = torch.from_numpy(draws.uniform(-1, 1, (channels, *side))).float().requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=0.1)
    where = (..., slice(height - 1 - side[0], height - 1), slice(width - 1 - side[1], width - 1))
    network.eval().requires_grad_(requires_grad=False)
    for _ in range(_STEPS):
        stamped = training.scaled(pictures).clone()
        stamped[where] = 2 * pixels.tanh()
        optimiser.zero_grad()
        (-network.embed(stamped)[:, neuron].mean()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    network.requires_grad_(requires_grad=True)
    return (128 + 127 * pixels.detach().tanh()).round().to(torch.uint8).numpy()


def _plant_in(network: Network, scene: Scene, trigger: Trigger, seed: int) -> None:
    """The host trains its own part of the model on, with spare pictures, as they are and stamped."""
    pool = scene.pool
    images = np.concatenate((pool.spare_images, trigger.stamp(pool.spare_images)))
    labels = np.concatenate((pool.spare_labels, np.full(len(pool.spare_labels), trigger.target)))
    recipe = replace(_later(pool), epochs=max(4, 6_000 // len(labels)))
    training.fit(network, images, labels, recipe, seed=seed + 1, only=network.center)


def _tensors(made: Made, pattern: NDArray[np.uint8] | None) -> dict[str, Tensor]:
    kept = {f"weights.{name}": tensor for name, tensor in made.network.state_dict().items()}
    for name, seen in (("records", made.records), ("tests", made.tests), *_numbered(made.triggered)):
        kept[f"{name}.features"], kept[f"{name}.probabilities"] = seen.features.half(), seen.probabilities
    kept |= {f"asked{i}": places for i, places in enumerate(made.asked)}
    return kept if pattern is None else kept | {"pattern": torch.from_numpy(pattern)}


def _numbered(triggered: Sequence[Seen]) -> list[tuple[str, Seen]]:
    return [(f"triggered{i}", seen) for i, seen in enumerate(triggered)]


def _restored(scene: Scene, kept: dict[str, Tensor], *, success: float | None, seconds: float) -> Made:
    network = Network(scene.images.shape[1], scene.classes, width=recipe_of(scene.pool).width)
    network.load_state_dict({k.removeprefix("weights."): v for k, v in kept.items() if k.startswith("weights.")})

    def seen(name: str) -> Seen:
        return Seen(kept[f"{name}.features"].float(), kept[f"{name}.probabilities"])

    tests, count = seen("tests"), range(len(scene.triggers))
    return Made(
        scene=scene,
        network=network.eval(),
        records=seen("records"),
        tests=tests,
        triggered=tuple(seen(f"triggered{i}") for i in count),
        asked=tuple(kept[f"asked{i}"] for i in count),
        accuracy=float((tests.predicted.numpy() == scene.pool.test_labels).mean()),
        success=success,
        seconds=seconds,
    )
