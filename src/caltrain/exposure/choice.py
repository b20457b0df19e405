"""The cheapest cut that meets a policy, or by how much each one misses it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from caltrain.errors import ConfigError, DataError
from caltrain.exposure.figures import Estimate
from caltrain.exposure.policy import ADVERSARIES, MEASURES, Bound, Policy, key_of
from caltrain.exposure.statistics import records_to_show

Figures = Mapping[str, Estimate]
_STEP = "choose cut"


class Miss(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A bound that a cut does not meet. `reached`: what was held against it, an interval's end or the mean."""

    key: str
    limit: float
    reached: float
    mean: float
    n: int
    by_mean: bool
    """Whether the mean misses it too, or only the confidence interval."""

    @property
    def by(self) -> float:
        """By how much, in the unit of the measure; positive."""
        return abs(self.reached - self.limit)

    @property
    def share(self) -> float:
        """By how much as a share of the limit, by which misses of unlike measures are compared."""
        return self.by / max(abs(self.limit), 0.01) if math.isfinite(self.by) else math.inf


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`front`: the cut, or None where none meets the policy; then `nearest` misses by least, and `advice` may help.

    `misses` are each cut's own. Where deeper cuts count (`Policy.all_deeper`), `nearest` is judged with theirs.
    """

    front: int | None
    nearest: int | None
    misses: dict[int, tuple[Miss, ...]]
    advice: tuple[str, ...] = ()


def choose(policy: Policy, figures: Mapping[int, Figures], *, costs: Mapping[int, float]) -> Choice:
    """The cut of least cost, of equally cheap ones the deepest, whose `figures` (by cut and key) meet all bounds.

    A bound on an adversary holds for all weaker ones that were measured as well: who knows the FrontNet can train an
    inverter. Raises ConfigError `policy.not-measured`, DataError `exposure.too-few-for-policy`.
    """
    if not figures:
        raise ConfigError(
            "policy.not-measured", "no cut was assessed", step=_STEP, fix="Assess the cuts to choose from."
        )
    misses = {cut: tuple(_misses(policy, cut, figures[cut])) for cut in sorted(figures)}
    counted = {cut: [m for other in misses if _counts(policy, other, cut) for m in misses[other]] for cut in misses}
    good = [cut for cut in misses if not counted[cut]]
    if good:
        return Choice(front=min(good, key=lambda cut: (costs[cut], -cut)), nearest=None, misses=misses)
    nearest = min(misses, key=lambda cut: (_share(counted[cut]), costs[cut], -cut))
    worst = max((other for other in misses if _counts(policy, other, nearest)), key=lambda cut: _share(misses[cut]))
    return Choice(front=None, nearest=nearest, misses=misses, advice=_advice(misses, worst))


def _counts(policy: Policy, other: int, cut: int) -> bool:
    return other == cut or (policy.all_deeper and other > cut)


def _share(misses: Sequence[Miss]) -> float:
    return max((miss.share for miss in misses), default=0.0)


def _misses(policy: Policy, cut: int, figures: Figures) -> list[Miss]:
    found: list[Miss] = []
    for bound in policy.bounds:
        if key_of(bound) not in figures:
            raise _not_measured(bound, cut)
        for key in _keys(bound):
            if key in figures:
                _check_enough(policy, bound, key, figures[key])
                found += _miss(policy, bound, key, figures[key])
    return found


def _keys(bound: Bound) -> list[str]:
    """Its own figure, and those of weaker adversaries."""
    if MEASURES[bound.measure].run != "attack":
        return [bound.measure]
    return [f"{name}.{bound.measure}" for name in ADVERSARIES[ADVERSARIES.index(bound.adversary) :]]


def _miss(policy: Policy, bound: Bound, key: str, figure: Estimate) -> list[Miss]:
    far = figure.high if bound.at_least is None else figure.low
    reached = far if policy.use == "bound" else figure.value
    if _meets(bound, reached):
        return []
    by_mean = not _meets(bound, figure.value)
    return [Miss(key=key, limit=bound.limit, reached=reached, mean=figure.value, n=figure.n, by_mean=by_mean)]


def _meets(bound: Bound, value: float) -> bool:
    """False for what is not a number."""
    return value <= bound.limit if bound.at_least is None else value >= bound.limit


def _check_enough(policy: Policy, bound: Bound, key: str, figure: Estimate) -> None:
    if policy.use == "mean" or bound.measure != "reidentification":
        return
    needed = records_to_show(bound.limit)
    if figure.n < needed:
        raise DataError(
            "exposure.too-few-for-policy",
            f"{key} over {figure.n} records cannot be shown to be at most {bound.limit:g}, not even without a hit",
            step=_STEP,
            fix=f'Assess at least {needed} records, allow a higher rate, or let the mean decide (use = "mean").',
        )


def _not_measured(bound: Bound, cut: int) -> ConfigError:
    run = MEASURES[bound.measure].run
    name = bound.adversary if run == "attack" else run
    return ConfigError(
        "policy.not-measured",
        f"the policy bounds {key_of(bound)}, which was not measured at cut {cut}",
        step=_STEP,
        fix=f"Assess with {name} among the attacks." if run != "inside" else "Let the measures inside run, too.",
    )


def _advice(misses: Mapping[int, tuple[Miss, ...]], worst: int) -> tuple[str, ...]:
    """What would help, given that no cut meets the policy, and that cut `worst` stands in the way."""
    advice, clean = [], [cut for cut in misses if not misses[cut]]
    if clean:
        advice.append(
            f"cut {clean[-1]} meets the policy, but deeper ones do not, so one of them was measured badly: assess more "
            "records, with stronger attacks; or set all_deeper = false"
        )
    unsure = [miss for miss in misses[worst] if not miss.by_mean and math.isfinite(miss.reached - miss.mean)]
    advice += [f"at cut {worst} the mean meets {m.key}: assess about {_records_for(m)} records" for m in unsure]
    keys = {miss.key for miss in misses[worst] if miss not in unsure}
    if keys - {"label_purity"}:
        advice.append(f"at cut {worst} add noise, or cross fewer channels or fewer bits: each has a price in accuracy")
    if "label_purity" in keys:
        advice.append(
            "train in the ternary form, with more layers in the HeadNet: labels show by what leaves or returns"
        )
    if worst == max(misses):
        advice.append(f"cut {worst} is the deepest that was assessed: assess deeper ones, or take a deeper model")
    return tuple(advice)


def _records_for(miss: Miss) -> int:
    """How many records narrow the interval to the limit if the mean stays: it narrows with the root of their number."""
    wide, left = abs(miss.reached - miss.mean), abs(miss.limit - miss.mean)
    return math.ceil(miss.n * min(wide / left if left else math.inf, 1000) ** 2)
