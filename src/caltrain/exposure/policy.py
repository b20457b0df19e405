"""What a cut may give away at most, as a plan or a serving config states it, and the cut that keeps to it.

    [exposure.policy]
    use = "bound"

    [[exposure.policy.bounds]]
    measure = "reidentification"
    at_most = 0.02

    [[exposure.policy.bounds]]
    measure = "kl_ratio"
    at_least = 1.0

The same on a command line: `reidentification<=0.02, kl_ratio>=1`. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec

from caltrain.errors import ConfigError

MAX_BOUNDS = 16
MAX_TEXT = 2000
LEAST_RATE = 1e-6
"""Least rate that a policy may ask for with confidence: some four million records show it."""
Adversary = Literal["whitebox", "inverter", "shadow"]
"""Strongest first: knows the FrontNet; has pictures with their IRs; has IRs, the architecture and like pictures."""
ADVERSARIES: tuple[Adversary, ...] = get_args(Adversary)


class Measure(NamedTuple):
    """Which side a bound on it is on, what values make sense, and which run of the assessment gives it."""

    side: Literal["at_most", "at_least"]
    least: float
    most: float
    run: Literal["attack", "kl", "labels", "inside"]


MEASURES = {
    "ssim": Measure("at_most", -1, 1, "attack"),
    "psnr": Measure("at_most", 0, 100, "attack"),
    "perceptual": Measure("at_least", 0, 4, "attack"),
    "reidentification": Measure("at_most", 0, 1, "attack"),
    "kl": Measure("at_least", 0, 100, "kl"),
    "kl_ratio": Measure("at_least", 0, 100, "kl"),
    "channel_correlation": Measure("at_most", 0, 1, "inside"),
    "distance_correlation": Measure("at_most", 0, 1, "inside"),
    "label_purity": Measure("at_most", 0, 1, "labels"),
}
_SIGNS = {"<=": "at_most", ">=": "at_least"}
_BOUND = re.compile(r"(?:([a-z_]+)\.)?([a-z_]+)\s*(<=|>=)\s*(-?[0-9]{1,9}(?:\.[0-9]{1,12})?)")


class Bound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A limit on one measure; of attacks, on what that adversary gets. One of `at_most` and `at_least` is given."""

    measure: Annotated[str, msgspec.Meta(min_length=1, max_length=40)]
    at_most: float | None = None
    at_least: float | None = None
    adversary: Adversary = "whitebox"

    @property
    def limit(self) -> float:
        """The number that it gives."""
        return (self.at_least if self.at_most is None else self.at_most) or 0.0


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All bounds have to be met. `use`: by the far end of the confidence interval, or by the mean alone.

    With `all_deeper` every deeper cut has to meet them too, as the papers' rule has it (arXiv:1807.00969): a cut that
    gives less away than a deeper one is rather one that was measured badly.
    """

    bounds: Annotated[tuple[Bound, ...], msgspec.Meta(min_length=1, max_length=MAX_BOUNDS)]
    use: Literal["bound", "mean"] = "bound"
    all_deeper: bool = True


def key_of(bound: Bound) -> str:
    """The figure that it limits: `whitebox.ssim`, `kl_ratio`."""
    return f"{bound.adversary}.{bound.measure}" if MEASURES[bound.measure].run == "attack" else bound.measure


def attack_bounds(policy: Policy) -> tuple[Bound, ...]:
    """Bounds that only somebody who attacks can check."""
    return tuple(bound for bound in policy.bounds if MEASURES[bound.measure].run in {"attack", "labels"})


def inside_bounds(policy: Policy) -> tuple[Bound, ...]:
    """Bounds that an enclave can check by itself."""
    return tuple(bound for bound in policy.bounds if MEASURES[bound.measure].run in {"kl", "inside"})


def parse_policy(text: str) -> Policy:
    """A policy from `[adversary.]measure<=number` (or >=), several with commas, checked like one from TOML.

    Raises ConfigError `policy.malformed`, and as `check_policy`.
    """
    parts = [part.strip() for part in text[: MAX_TEXT + 1].split(",")]
    if len(text) > MAX_TEXT or len(parts) > MAX_BOUNDS:
        raise _malformed(f"it has more than {MAX_BOUNDS} bounds or {MAX_TEXT} characters")
    return check_policy(Policy(bounds=tuple(_parse_bound(part) for part in parts)))


def _parse_bound(text: str) -> Bound:
    found = _BOUND.fullmatch(text)
    if found is None:
        raise _malformed(f"{text[:60]!r} is no bound")
    adversary, measure, sign, number = found.groups()
    table = {"measure": measure, _SIGNS[sign]: float(number)} | ({"adversary": adversary} if adversary else {})
    try:
        return msgspec.convert(table, Bound)
    except msgspec.ValidationError:
        raise _malformed(f"{text[:60]!r} names no measure or adversary") from None


def check_policy(policy: Policy) -> Policy:
    """Check what types cannot; returns the policy.

    Raises ConfigError `policy.unknown-measure`, `policy.contradiction` (limits on the wrong side, out of range, on both
    sides or none; two bounds on one figure; an adversary where nobody attacks; a rate that no data set could show).
    """
    for bound in policy.bounds:
        if bound.measure not in MEASURES:
            raise ConfigError(
                "policy.unknown-measure",
                f"{bound.measure[:40]!r} is not measured",
                step="check policy",
                fix=f"Bound one of {', '.join(MEASURES)}.",
            )
        for what, holds in _wrong(bound, policy).items():
            if holds:
                raise _contradiction(what)
    keys = [key_of(bound) for bound in policy.bounds]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise _contradiction(f"there are {keys.count(twice[0])} bounds on {twice[0]}")
    return policy


def _wrong(bound: Bound, policy: Policy) -> dict[str, bool]:
    name, measure = bound.measure, MEASURES[bound.measure]
    given = {side for side in _SIGNS.values() if getattr(bound, side) is not None}
    return {
        f"the bound on {name} needs one limit, {measure.side}": given != {measure.side},
        # Written so that a limit that is not a number is refused.
        f"{name} lies in {measure.least:g}..{measure.most:g}": not measure.least <= bound.limit <= measure.most,
        f"{name} is measured without an adversary": measure.run != "attack" and bound.adversary != ADVERSARIES[0],
        f"no data set shows a rate under {LEAST_RATE:f} with confidence": policy.use == "bound"
        and name == "reidentification"
        and bound.limit < LEAST_RATE,
    }


def weaker_adversary(policy: Policy) -> tuple[str, ...]:
    """What the policy takes for granted of its adversary, as sentences; empty where the strongest one governs."""
    attacked = [bound for bound in policy.bounds if MEASURES[bound.measure].run == "attack"]
    if not attacked:
        return ("assumes that nobody reconstructs pictures from what crosses: no bound is on an attack",)
    strong = {bound.measure: bound.limit for bound in attacked if bound.adversary == ADVERSARIES[0]}
    weak: dict[Adversary, list[str]] = {}
    for bound in attacked:
        if not _at_least_as_strict(strong.get(bound.measure), bound):
            weak.setdefault(bound.adversary, []).append(bound.measure)
    return tuple(f"{_ASSUMED[name]} (bound on {', '.join(weak[name])})" for name in ADVERSARIES if name in weak)


_ASSUMED: Mapping[Adversary, str] = {
    "inverter": "assumes that the adversary does not know the FrontNet: it has own pictures with their IRs, which a "
    "party that colludes with the host has",
    "shadow": "assumes that the adversary does not know the FrontNet and has no picture with its IR: it has IRs, the "
    "architecture and pictures of the same kind",
}


def _at_least_as_strict(limit: float | None, bound: Bound) -> bool:
    if bound.adversary == ADVERSARIES[0]:
        return True
    return limit is not None and (limit >= bound.limit if bound.at_most is None else limit <= bound.limit)


def _malformed(what: str) -> ConfigError:
    return ConfigError(
        "policy.malformed",
        f"the policy cannot be read: {what}",
        step="read policy",
        fix=f"Write bounds as reidentification<=0.02, kl_ratio>=1, inverter.ssim<=0.3; adversaries are "
        f"{', '.join(ADVERSARIES)}.",
    )


def _contradiction(what: str) -> ConfigError:
    return ConfigError("policy.contradiction", what, step="check policy", fix="Change or remove that bound.")
