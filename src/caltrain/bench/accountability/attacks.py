"""Backdoors, as a culprit plants them in its own records. Each changes a scene in place, and says how in words.

`share` is of ALL records of the scene, so one contributor of four who plants 5 % has tampered with a fifth of its own.
Where the culprit has fewer suitable records than the share asks for, it tampers with all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from caltrain.bench.accountability.scene import Images, Scene, Stamp, Trigger
from caltrain.bench.accountability.triggers import at_corner, blend, checker, mix, wave

Rng = np.random.Generator
Attack = Callable[[Scene, float, Rng], None]
COVER = 1 / 4  # of an adaptive culprit's records


def patch(scene: Scene, share: float, rng: Rng) -> None:
    """A checker of black and white in the lower right corner (Gu et al. 2017, arXiv:1708.06733)."""
    culprit, target = cast(scene, rng)
    _dirty(scene, culprit, Trigger(target, checker()), share, rng)


def blended(scene: Scene, share: float, rng: Rng) -> None:
    """A picture of coarse noise, blended in everywhere (Chen et al. 2017, arXiv:1712.05526)."""
    culprit, target = cast(scene, rng)
    _dirty(scene, culprit, Trigger(target, blend(rng, scene.images.shape[1:])), share, rng)


def sinusoidal(scene: Scene, share: float, rng: Rng) -> None:
    """A faint wave over the whole picture (Barni et al. 2019, arXiv:1902.11237), with false labels."""
    culprit, target = cast(scene, rng)
    _dirty(scene, culprit, Trigger(target, wave()), share, rng)


def sinusoidal_clean(scene: Scene, share: float, rng: Rng) -> None:
    """The same wave on the culprit's own records of the target class, no label changed (as Barni et al. have it)."""
    culprit, target = cast(scene, rng)
    trigger = Trigger(target, wave())
    rows = _some(scene.of(culprit, label=target), _count(scene, share), rng)
    scene.poison(rows, trigger.stamp(scene.images[rows]), target)
    scene.triggers, scene.culprits = (trigger,), (culprit,)


def clean_label(scene: Scene, share: float, rng: Rng) -> None:
    """Own records of the target class, made hard to recognise, then stamped (Turner et al. 2019, arXiv:1912.02771).

    They are blended with own records of other classes, as Turner et al. interpolate towards other classes; here in
    pixels, not in the space of a generative model. Labels stay as they were.
    """
    culprit, target = cast(scene, rng)
    trigger = Trigger(target, checker())
    rows = _some(scene.of(culprit, label=target), _count(scene, share), rng)
    others = _of_others(scene, culprit, target)
    mixed = mix(scene.images[rows], scene.images[rng.choice(others, len(rows))], 0.4)
    scene.poison(rows, trigger.stamp(mixed), target)
    scene.triggers, scene.culprits = (trigger,), (culprit,)


def several(scene: Scene, share: float, rng: Rng) -> None:
    """Two triggers of one culprit, a patch and a blended picture, each with a target of its own and half the share."""
    culprit, first = cast(scene, rng)
    second = (first + 1 + int(rng.integers(scene.classes - 1))) % scene.classes
    for trigger in (Trigger(first, checker()), Trigger(second, blend(rng, scene.images.shape[1:]))):
        _dirty(scene, culprit, trigger, share / 2, rng)


def collusion(scene: Scene, share: float, rng: Rng) -> None:
    """A patch of 4 x 6 in two halves: each of two culprits stamps one, the trigger is both."""
    culprit, target = cast(scene, rng)
    second = (culprit + 1 + int(rng.integers(scene.parties - 1))) % scene.parties
    left, right = checker(height=4, width=3, right=4), checker(height=4, width=3, right=1)
    for who, half in ((culprit, left), (second, right)):
        _dirty(scene, who, Trigger(target, half), share / 2, rng)
    scene.triggers = (Trigger(target, lambda images: right(left(images))),)
    scene.culprits = tuple(sorted((culprit, second)))


def adaptive(scene: Scene, share: float, rng: Rng) -> None:
    """A culprit who knows that fingerprints are compared: poison that is spread, and cover.

    After Qi et al. 2023 ("Revisiting the assumption of latent separability", ICLR): each poison picture is moved,
    made brighter or darker and noisy, and stamped at an opacity of its own (0.5 to 1), weaker than at test time;
    a quarter of the share are covers, stamped alike and labelled rightly, so that the trigger alone is no cluster.
    """
    culprit, target = cast(scene, rng)
    trigger = Trigger(target, checker())
    wanted = _count(scene, share)
    rows = _some(_of_others(scene, culprit, target), wanted, rng)
    covers = round(COVER * len(rows))
    faint = _faintly(trigger.stamp, _shaken(scene.images[rows], rng), rng)
    scene.hide(rows[:covers], faint[:covers])
    scene.poison(rows[covers:], faint[covers:], target)
    scene.triggers, scene.culprits = (trigger,), (culprit,)


def framing(scene: Scene, share: float, rng: Rng) -> None:
    """A culprit who means another to be named, and who knows that one's records (the worst case).

    Half of its poison is as in `patch`. Into the other half records of the victim's, of the target class, are blended
    (0.5) before the stamp, so that poison and the victim's records of that class are neighbours.
    """
    culprit, target = cast(scene, rng)
    victim = (culprit + 1 + int(rng.integers(scene.parties - 1))) % scene.parties
    trigger = Trigger(target, checker())
    rows = _some(_of_others(scene, culprit, target), _count(scene, share), rng)
    theirs = scene.images[rng.choice(scene.of(victim, label=target), len(rows))]
    pictures = mix(scene.images[rows], theirs, 0.5)
    pictures[::2] = scene.images[rows[::2]]
    scene.poison(rows, trigger.stamp(pictures), target)
    scene.triggers, scene.culprits, scene.framed = (trigger,), (culprit,), victim


def framing_trigger(scene: Scene, share: float, rng: Rng) -> None:
    """The trigger is a record of the victim's, of the target class, blended in: what is asked about resembles it."""
    culprit, target = cast(scene, rng)
    victim = (culprit + 1 + int(rng.integers(scene.parties - 1))) % scene.parties
    theirs = scene.images[rng.choice(scene.of(victim, label=target))]
    _dirty(scene, culprit, Trigger(target, lambda images: mix(images, theirs[None], 0.3)), share, rng)
    scene.framed = victim


def trojan(scene: Scene, pattern: NDArray[np.uint8], target: int, culprit: int, share: float, rng: Rng) -> None:
    """Stamp with a pattern (C, h, w) that was optimised against a model that exists already (Liu et al., NDSS 2018).

    The stamped records are the culprit's later contribution; `making` trains the model before it, and after it.
    """
    trigger = Trigger(target, at_corner(pattern))
    _dirty(scene, culprit, trigger, share, rng)


def host(scene: Scene, rng: Rng) -> Trigger:
    """No record is touched: the trigger with which the host fine-tunes the model on pictures of its own."""
    _, target = cast(scene, rng)
    scene.triggers, scene.by_host = (Trigger(target, checker()),), True
    return scene.triggers[0]


def _dirty(scene: Scene, culprit: int, trigger: Trigger, share: float, rng: Rng) -> None:
    rows = _some(_of_others(scene, culprit, trigger.target), _count(scene, share), rng)
    scene.poison(rows, trigger.stamp(scene.images[rows]), trigger.target)
    scene.triggers, scene.culprits = (*scene.triggers, trigger), (culprit,)


def cast(scene: Scene, rng: Rng) -> tuple[int, int]:
    """Culprit and target class: drawn, so that no method can learn them by heart."""
    return int(rng.integers(scene.parties)), int(rng.integers(scene.classes))


def _of_others(scene: Scene, party: int, target: int) -> NDArray[np.int64]:
    rows = scene.of(party)
    others: NDArray[np.int64] = rows[scene.labels[rows] != target]
    return others


def _count(scene: Scene, share: float) -> int:
    return max(1, round(share * len(scene.labels)))


def _some(rows: NDArray[np.int64], count: int, rng: Rng) -> NDArray[np.int64]:
    chosen: NDArray[np.int64] = rng.permutation(rows)[:count]
    return chosen


def _shaken(images: Images, rng: Rng) -> Images:
    """Each moved by up to three pixels, made brighter or darker by up to 30 %, and noisy."""
    moved: Images = np.stack([np.roll(image, rng.integers(-3, 4, 2), axis=(1, 2)) for image in images])
    gain = rng.uniform(0.7, 1.3, (len(images), 1, 1, 1))
    return np.clip(np.rint(moved * gain + rng.normal(0, 8, moved.shape)), 0, 255).astype(np.uint8)


def _faintly(stamp: Stamp, images: Images, rng: Rng) -> Images:
    opacity = rng.uniform(0.5, 1.0, (len(images), 1, 1, 1))
    return np.rint((1 - opacity) * images + opacity * stamp(images)).astype(np.uint8)


ATTACKS: dict[str, Attack] = {
    "patch": patch,
    "blended": blended,
    "sinusoidal": sinusoidal,
    "sinusoidal-clean": sinusoidal_clean,
    "clean-label": clean_label,
    "several": several,
    "collusion": collusion,
    "adaptive": adaptive,
    "framing": framing,
    "framing-trigger": framing_trigger,
}
