"""What an assessment is asked to do, and whether it can."""

from __future__ import annotations

import math
from dataclasses import dataclass

from caltrain.errors import ConfigError
from caltrain.exposure.attacks.labels import check_enough
from caltrain.exposure.choice import choose
from caltrain.exposure.defence_spec import DefenceSpec
from caltrain.exposure.figures import BudgetName, Estimate
from caltrain.exposure.material import Material
from caltrain.exposure.policy import ADVERSARIES, Policy
from caltrain.exposure.report import MEASURES
from caltrain.exposure.subject import Subject, candidate_cuts, check_front

ATTACKS = ("kl", *ADVERSARIES, "labels")


@dataclass(frozen=True)
class Asked:
    """What to assess. `cuts` empty: every one; `kl_inputs`: pictures of others for KL; `maps` None: all of a cut."""

    attacks: tuple[str, ...] = ATTACKS
    cuts: tuple[int, ...] = ()
    budget: BudgetName = "quick"
    maps: int | None = 64
    kl_inputs: int = 256
    tolerance: float = 1.0
    seed: int = 0
    policy: Policy | None = None
    defences: tuple[DefenceSpec, ...] = ()


def check_asked(subject: Subject, asked: Asked, material: Material) -> None:
    """Refuse what could not be done, before anything long runs.

    Raises ConfigError `exposure.unknown-attack`, `exposure.tolerance`, `exposure.cut`, `policy.not-measured`,
    DataError `exposure.too-few`, `exposure.too-few-for-policy`.
    """
    unknown = [name for name in asked.attacks if name not in ATTACKS]
    if unknown or not asked.attacks:
        raise ConfigError(
            "exposure.unknown-attack",
            f"{unknown[0]!r:.60} is no attack" if unknown else "no attack was asked for",
            step="assess exposure",
            fix=f"Choose among {', '.join(ATTACKS)}.",
        )
    if not 0 <= asked.tolerance < math.inf:  # written so that what is not a number is refused
        raise ConfigError(
            "exposure.tolerance",
            f"a KL ratio of {asked.tolerance:g} is no tolerance",
            step="assess exposure",
            fix="Give a number from 0 on; the papers have 1.",
        )
    for front in asked.cuts:
        check_front(subject.spec, front)
    if "labels" in asked.attacks:
        check_enough(len(material.candidates), len(subject.data.classes))
    if asked.policy is not None:
        front = min(asked.cuts or candidate_cuts(subject.spec))
        blank = Estimate(0, 0, 0, len(material.targets))
        choose(asked.policy, {front: dict.fromkeys(_measured(asked.attacks), blank)}, costs={front: 0})


def _measured(attacks: tuple[str, ...]) -> list[str]:
    """Keys of the figures that a cut then has."""
    keys = ["channel_correlation", "distance_correlation"]
    keys += ["kl", "kl_ratio"] if "kl" in attacks else []
    keys += ["label_purity"] if "labels" in attacks else []
    return keys + [f"{name}.{measure}" for name in attacks if name in ADVERSARIES for measure in MEASURES]
