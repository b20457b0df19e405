"""The demo's report as one HTML file without scripts or outside references."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from caltrain.demo.result import Story
from caltrain.files import write_whole
from caltrain.reports.pictures import data_uri
from caltrain.reports.terminal import center_note

_WIDTH, _HEIGHT = 520, 120


def write_report(path: Path, story: Story) -> None:
    """Render `story` to `path`."""
    environment = Environment(
        loader=PackageLoader("caltrain.reports"), autoescape=select_autoescape(), undefined=StrictUndefined
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    template = environment.get_template("demo.html")
    page = template.render(
        story=story, result=story.result, curve=_curve(story.losses), center_note=center_note(story.result.audit_rate)
    )
    write_whole(path, page.encode())


def _curve(losses: tuple[float, ...]) -> str:
    """Points of an SVG polyline, loss over epochs, in a box of `_WIDTH` x `_HEIGHT`."""
    top = max(losses, default=1.0) or 1.0
    step = _WIDTH / max(len(losses) - 1, 1)
    return " ".join(f"{i * step:.1f},{_HEIGHT - loss / top * _HEIGHT:.1f}" for i, loss in enumerate(losses))
