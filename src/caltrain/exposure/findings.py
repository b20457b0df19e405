"""What follows from the figures of all cuts: where leakage ends, where the papers' test and the attacks disagree."""

from __future__ import annotations

from collections.abc import Mapping

from caltrain.exposure.figures import Estimate, Scores
from caltrain.exposure.policy import ADVERSARIES, Adversary
from caltrain.exposure.report import MEASURES, CutReport, of_scores
from caltrain.exposure.statistics import spearman

_SMALLER_IS_CLOSER = {"perceptual"}


def beats(scores: Scores, floors: Mapping[str, Scores]) -> tuple[str, ...]:
    """Measures by which an attack is better than every floor, its confidence interval beyond theirs."""
    return tuple(name for name in MEASURES if not at_floor(name, of_scores(scores)[name], floors))


def at_floor(measure: str, found: Estimate, floors: Mapping[str, Scores]) -> bool:
    """Whether a figure is no closer to the truth than the best guess without an IR, as far as the intervals tell."""
    guesses = [of_scores(scores)[measure] for scores in floors.values()]
    if measure in _SMALLER_IS_CLOSER:
        return found.high >= min(guess.low for guess in guesses)
    return found.low <= max(guess.high for guess in guesses)


def floor_at(cuts: Mapping[int, CutReport], floors: Mapping[str, Scores]) -> dict[str, int | None]:
    """By `attack.measure`: the first cut from which on, to the deepest, it is at its floor; None where it is not."""
    found: dict[str, int | None] = {}
    for attack in attacks_of(cuts):
        for measure in MEASURES:
            first = None
            for front in sorted(cuts, reverse=True):
                if not at_floor(measure, of_scores(cuts[front].attacks[attack])[measure], floors):
                    break
                first = front
            found[f"{attack}.{measure}"] = first
    return found


def depth_correlations(cuts: Mapping[int, CutReport]) -> dict[str, float]:
    """Spearman's rank correlation with the depth of the cut, of every figure that all cuts have."""
    fronts = sorted(cuts)
    tables = [cuts[front].figures() for front in fronts]
    keys = [key for key in tables[0] if all(key in table for table in tables)] if len(fronts) > 2 else []
    return {key: spearman(fronts, [table[key].value for table in tables]) for key in keys}


def broken(
    cuts: Mapping[int, CutReport], floors: Mapping[str, Scores], *, tolerance: float
) -> dict[int, tuple[str, ...]]:
    """Cuts that the papers' rule calls safe, each with the attacks that re-identify or resemble beyond the floors."""
    found = {}
    for front, cut in cuts.items():
        if cut.kl is None or not cut.kl.ratio.value >= tolerance:
            continue
        names = tuple(
            name for name, scores in cut.attacks.items() if {"ssim", "reidentification"} & {*beats(scores, floors)}
        )
        if names:
            found[front] = names
    return found


def attacks_of(cuts: Mapping[int, CutReport]) -> list[Adversary]:
    """Adversaries who reconstructed pictures at every cut, strongest first."""
    return [name for name in ADVERSARIES if all(name in report.attacks for report in cuts.values())]
