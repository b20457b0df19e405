"""An exposure report on the terminal: one row a cut, then what follows from them."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from caltrain.exposure.attacks.labels import Groups
from caltrain.exposure.choice import Choice, Miss
from caltrain.exposure.figures import Estimate, Scores
from caltrain.exposure.findings import at_floor, attacks_of
from caltrain.exposure.report import CutReport, ExposureReport
from caltrain.reports.terminal import plain


def print_exposure(report: ExposureReport, console: Console) -> None:
    """Table and findings. What is no better than a guess is dim, the chosen cut bold."""
    settings = report.settings
    table = Table(
        title=plain(f"Exposure on {report.data}: {settings.targets} pictures of others, budget {settings.budget}"),
        title_justify="left",
        caption="SSIM 1: the same picture. re-id: true picture nearest of "
        f"{settings.candidates}. dim: no better than a guess",
        caption_justify="left",
    )
    for heading in ("cut", "layer", "inside", "bytes across"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    if "kl" in settings.attacks:
        table.add_column("KL ratio", justify="right")
    for name in attacks_of(report.cuts):
        table.add_column(f"{name}\nSSIM", justify="right")
        table.add_column("\nre-id", justify="right")
    if "labels" in settings.attacks:
        table.add_column("label purity\nof IRs", justify="right")
        table.add_column("\nof gradients", justify="right")
    chosen = report.choice.front if report.choice else None
    for front, cut in sorted(report.cuts.items()):
        table.add_row(*_row(report, front, cut), style="bold" if front == chosen else "")
    table.add_section()
    for guess, floor in report.floors.items() if attacks_of(report.cuts) else ():
        table.add_row(*_floor_row(report, guess, floor), style="dim")
    console.print(table)
    for line in findings(report):
        console.print(plain(line))


def findings(report: ExposureReport) -> Iterator[str]:
    """What the figures come to, a sentence a line."""
    if "kl" in report.settings.attacks:
        judge = f"a validator right on {report.judge.accuracy.value:.1%}" if report.judge else "the model itself"
        cut = f"cut {report.papers_cut}" if report.papers_cut is not None else "no cut that was assessed"
        yield f"the papers' rule (judge: {judge}) calls safe: {cut}"
    for front, names in sorted(report.broken.items()):
        yield f"cut {front} passes the papers' rule, but pictures come back there by {_and(names)}"
    if report.head_gradients is not None:
        yield f"ternary training: {_told(report.head_gradients)}"
    if report.choice is not None:
        yield from _chosen(report.choice)
    yield from report.assumptions
    for defence in report.defences:
        left = ", ".join(f"{name} SSIM {scores.ssim.value:.2f}" for name, scores in defence.attacks.items())
        yield (
            f"{defence.defence} at cut {defence.front}: {left or 'no attack'}; accuracy {report.accuracy.value:.1%} "
            f"falls to {defence.accuracy.value:.1%}, {defence.tuned.value:.1%} after tuning"
        )


def _told(groups: Groups) -> str:
    named = ", ".join(f"{named.right.value:.0%} named by {named.known} known of each class" for named in groups.named)
    return (
        f"gradients that leave the HeadNet fall into label groups with purity {groups.purity.value:.2f} "
        f"(floor {groups.floor:.2f}): {named}"
    )


def _chosen(choice: Choice) -> Iterator[str]:
    """The cut, or the nearest to one; with what it and deeper cuts miss, since a cut is judged with these."""
    if choice.front is not None:
        yield f"cut by the policy: {choice.front}"
        return
    yield f"no cut meets the policy; nearest is {choice.nearest}"
    for front, misses in sorted(choice.misses.items()):
        if misses and front >= (choice.nearest or 0):
            yield f"cut {front} misses {', '.join(_missed(miss) for miss in misses)}"
    yield from (f"may help: {advice}" for advice in choice.advice)


def _missed(miss: Miss) -> str:
    what = "its mean" if miss.by_mean else "the end of its interval, not its mean"
    return f"{miss.key} {miss.limit:g} by {miss.by:.3g} ({what})"


def _row(report: ExposureReport, front: int, cut: CutReport) -> list[Text]:
    cost = cut.cost
    cells = [
        Text(str(front)),
        plain(cost.layer),
        Text("?" if cost.compute is None else f"{cost.compute:.1%}"),
        Text(f"{cost.bytes_across:,}"),
    ]
    if "kl" in report.settings.attacks:
        cells.append(_cell(cut.kl.ratio if cut.kl else None))
    for name in attacks_of(report.cuts):
        scores = cut.attacks[name]
        for measure, value in (("ssim", scores.ssim), ("reidentification", scores.reidentification)):
            cells.append(_cell(value, dim=at_floor(measure, value, report.floors)))
    if "labels" in report.settings.attacks:
        cells.append(_cell(cut.labels.purity if cut.labels else None))
        cells.append(_cell(cut.labels.gradients.purity if cut.labels else None))
    return cells


def _floor_row(report: ExposureReport, name: str, floor: Scores) -> list[Text]:
    cells = [Text(), Text(f"floor: {name}"), Text(), Text()]
    if "kl" in report.settings.attacks:
        cells.append(Text())
    for _ in attacks_of(report.cuts):
        cells += [_cell(floor.ssim), _cell(floor.reidentification)]
    return cells


def _cell(value: Estimate | None, *, dim: bool = False) -> Text:
    return Text("" if value is None else f"{value.value:.2f}", style="dim" if dim else "")


def _and(names: tuple[str, ...]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
