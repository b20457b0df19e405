"""An exposure report as one HTML file: figures, plots, pictures; no scripts, no outside references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from caltrain.exposure.figures import Estimate
from caltrain.exposure.findings import at_floor, attacks_of
from caltrain.exposure.policy import key_of
from caltrain.exposure.report import MEASURES, CutReport, ExposureReport, of_scores
from caltrain.files import write_whole
from caltrain.reports.exposure_text import findings
from caltrain.reports.page import environment
from caltrain.reports.pictures import data_uri, png
from caltrain.reports.plot import Points, line_plot

if TYPE_CHECKING:
    from torch import Tensor

    from caltrain.exposure.assess import Gallery

_SHOWN = 3


class Strip(NamedTuple):
    """A cell of the grid: what it shows of each input, as image sources."""

    what: str
    sources: list[str]


def write_exposure(path: Path, report: ExposureReport, gallery: Gallery) -> None:
    """Render to `path`. Raises EnvironmentFault `file.not-written`."""
    pages = environment()
    pages.filters["estimate"] = estimate
    pages.tests["at_floor"] = lambda value, measure: at_floor(measure, value, report.floors)
    page = pages.get_template("exposure.html").render(
        report=report,
        cuts=sorted(report.cuts.items()),
        attacks=attacks_of(report.cuts),
        measures=MEASURES,
        key_of=key_of,
        scores=of_scores,
        plots=[Markup(plot) for plot in plots(report)],  # noqa: S704  # line_plot escapes its texts
        grid=grid(report, gallery),
        findings=list(findings(report)),
    )
    write_whole(path, page.encode())


def estimate(value: Estimate, measure: str = "") -> str:
    """`0.72 (0.68 to 0.75)`; shares in percent."""
    if measure == "reidentification":
        return f"{value.value:.1%} ({value.low:.1%} to {value.high:.1%})"
    digits = 1 if measure == "psnr" else 2
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def plots(report: ExposureReport) -> list[str]:
    """Over the cut: SSIM and re-identification with their floors, the KL ratio with 1, what a cut costs."""
    found = []
    if attacks_of(report.cuts):
        found.append(_attack_plot(report, "ssim", "SSIM of reconstructions"))
        found.append(_attack_plot(report, "reidentification", "share re-identified"))
    if "kl" in report.settings.attacks:
        ratio = _over_cuts(report, lambda cut: cut.kl.ratio.value if cut.kl else None)
        found.append(_plot({"KL ratio": ratio, "uniform guess": _level(report, 1.0)}, "KL ratio (papers)", "ratio"))
    inside = _over_cuts(report, lambda cut: cut.cost.compute)
    if inside:
        found.append(_plot({"compute inside": inside}, "compute inside", "share"))
    across = _over_cuts(report, lambda cut: cut.cost.bytes_across / 1000)
    found.append(_plot({"bytes across": across}, "bytes across, a record", "kB"))
    return found


def _attack_plot(report: ExposureReport, measure: str, title: str) -> str:
    best = max(of_scores(floor)[measure].value for floor in report.floors.values())

    def of(name: str) -> Points:
        return _over_cuts(report, lambda cut: of_scores(cut.attacks[name])[measure].value)

    lines: dict[str, Points] = {name: of(name) for name in attacks_of(report.cuts)}
    return _plot(lines | {"best guess": _level(report, best)}, title, measure)


def _over_cuts(report: ExposureReport, value: Callable[[CutReport], float | None]) -> Points:
    found = ((front, value(cut)) for front, cut in sorted(report.cuts.items()))
    return [(front, number) for front, number in found if number is not None]


def _level(report: ExposureReport, value: float) -> Points:
    return [(front, value) for front in sorted(report.cuts)]


def _plot(lines: dict[str, Points], title: str, y: str) -> str:
    svg = line_plot(lines, title=title, x="layers in front", y=y)
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "")  # inside a page it needs none


def grid(report: ExposureReport, gallery: Gallery) -> list[tuple[int, list[Strip]]]:
    """By cut: inputs, the most telling map, each attack's reconstructions, of the first three targets."""
    rows = []
    for front in sorted(report.cuts):
        strips = [Strip("input", _sources(gallery.inputs))]
        if front in gallery.maps:
            strips.append(Strip("most telling map", _sources(gallery.maps[front])))
        strips += [Strip(name, _sources(gallery.pictures[front, name])) for name in attacks_of(report.cuts)]
        rows.append((front, strips))
    return rows


def _sources(pictures: Tensor) -> list[str]:
    """Of pictures (N, C, H, W) in 0..1; of other than one or three channels the mean."""
    shown = pictures[:_SHOWN].detach().float().clamp(0, 1)
    if shown.shape[1] not in {1, 3}:
        shown = shown.mean(1, keepdim=True)
    return [data_uri(png((picture * 255).round().byte().numpy())) for picture in shown]
