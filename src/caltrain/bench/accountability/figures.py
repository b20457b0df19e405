"""The figures of a case: one method's tallies over its runs, put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from caltrain.bench.accountability.questions import Tally


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One method on one case, over all its runs. None where a figure has no meaning, or nothing was said.

    A verdict is one answer to a question: for a backdoor all triggered queries of a run at once, else clean
    mispredictions, one at a time and in nines. Runs in which the attack did not take (no triggered query) ask nothing.
    """

    precision_at_9: float | None
    """Mean share of tampered records (planted or mislabelled) among the nine that are ranked highest for a query."""
    poison_precision: float | None
    """Mean share of planted records (poison and its cover) among those that are held responsible; of runs with any."""
    poison_recall: float | None
    """Mean share of the poison that is held responsible; 0 where nobody was named."""
    contributor_accuracy: float | None
    """Backdoors: share of runs in which all culprits are named and nobody else. Label noise: share of runs in which
    the contributors are ranked by their shares of wrong labels without a mistake."""
    false_accusation_rate: float | None
    """Share of verdicts that name somebody who did nothing: no culprit, and without a wrong label."""
    false_accusation_low: float | None
    """Lower end of its exact (Clopper and Pearson) interval of 95 %."""
    false_accusation_high: float | None
    """Its upper end."""
    cannot_tell_rate: float | None
    """Share of verdicts that name nobody."""
    mislabel_average_precision: float | None
    """Average precision of the suspicion of a wrong label over all records, mean of the runs with label noise."""
    noise_rate_error: float | None
    """Largest error of a contributor's estimated share of wrong labels; mean of runs without a backdoor."""
    noise_interval_coverage: float | None
    """Share of contributors whose true share lies in its interval."""
    noise_interval_width: float | None
    """Mean width of those intervals."""
    verdicts: int
    """Questions that were answered."""


def figures(tallies: Sequence[Tally]) -> Figures:
    """Of one method, over at least one run of one case."""
    asked, falsely = sum(t.asked for t in tallies), sum(t.falsely for t in tallies)
    low, high = interval(int(falsely), int(asked))
    right = [t.right for t in tallies] + [t.ranked for t in tallies]
    return Figures(
        precision_at_9=_mean(t.precision_at_9 for t in tallies),
        poison_precision=_mean(t.poison_precision for t in tallies),
        poison_recall=_mean(t.poison_recall for t in tallies),
        contributor_accuracy=_mean(right),
        false_accusation_rate=falsely / asked if asked else None,
        false_accusation_low=low,
        false_accusation_high=high,
        cannot_tell_rate=sum(t.unsure for t in tallies) / asked if asked else None,
        mislabel_average_precision=_mean(t.average_precision for t in tallies),
        noise_rate_error=_mean(t.rate_error for t in tallies),
        noise_interval_coverage=_mean(t.covered for t in tallies),
        noise_interval_width=_mean(t.width for t in tallies),
        verdicts=int(asked),
    )


def interval(hits: int, trials: int) -> tuple[float | None, float | None]:
    """Exact interval of 95 % of a share (Clopper and Pearson 1934); of no trial there is none."""
    from scipy.stats import binomtest  # noqa: PLC0415  # a second, only where it is needed

    if not trials:
        return None, None
    found = binomtest(hits, trials).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
