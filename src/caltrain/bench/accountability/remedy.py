"""Does leaving the blamed records out repair the model? Three models of one seed, so that they can be compared."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.bench.accountability.cache import Cache, Plain
from caltrain.bench.accountability.making import Made, examine, learn
from caltrain.bench.accountability.questions import Method, questions
from caltrain.bench.accountability.scene import Scene
from caltrain.crypto.digests import digest


class State(msgspec.Struct, frozen=True):
    """Of one model: accuracy on test pictures, and the share of them that the trigger turns into the target."""

    accuracy: float
    attack_success: float


class Repair(msgspec.Struct, frozen=True, kw_only=True):
    """The model as it was poisoned; retrained without the records that the verdict blames; and one that never saw
    what was planted. All three start from the same first weights. `left_out` records were blamed.
    """

    seed: int
    left_out: int
    poisoned: State
    repaired: State
    never_poisoned: State


def repaired(made: Made, method: Method, cache: Cache, about: dict[str, Plain], *, seed: int) -> Repair | None:
    """Ask about the triggered queries, and train again without the suspects; None where there is nothing to ask."""
    scene, asked = made.scene, questions(made)
    if not scene.culprits or not asked or made.success is None:
        return None
    blamed = np.zeros(len(scene.labels), bool)
    blamed[method.answer(asked[0]).suspects.numpy()] = True
    return Repair(
        seed=seed,
        left_out=int(blamed.sum()),
        poisoned=State(made.accuracy, made.success),
        repaired=_without(scene, blamed, cache, about, seed),
        never_poisoned=_without(scene, scene.poisoned | scene.cover, cache, about, seed),
    )


def _without(scene: Scene, rows: NDArray[np.bool_], cache: Cache, about: dict[str, Plain], seed: int) -> State:
    of: dict[str, Plain] = {**about, "kind": "remedy", "without": str(digest("bench-remedy/v1", rows.tobytes()))}
    kept = cache.get(of)
    if kept is None:
        found = examine(scene, learn(scene, seed=seed, without=rows))
        state = State(found.accuracy, found.success or 0.0)
        cache.put(of, {"without": torch.from_numpy(rows)}, msgspec.to_builtins(state))
        return state
    return msgspec.convert(kept.figures, State)
