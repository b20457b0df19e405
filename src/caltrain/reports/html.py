"""The demo's report as one HTML file without scripts or outside references."""

from __future__ import annotations

from pathlib import Path

from caltrain.demo.result import Story
from caltrain.reports.intervals import bars
from caltrain.reports.page import write_page
from caltrain.reports.space import panels
from caltrain.reports.verdict import kinds_of

_WIDTH, _HEIGHT = 520, 120


def write_report(path: Path, story: Story) -> None:
    """Render `story` to `path`."""
    write_page(
        path,
        "demo.html",
        story=story,
        result=story.result,
        kinds=kinds_of(story.verdict),
        curve=_curve(story.losses),
        panels=panels(story.space, [party.name for party in story.parties]),
        bars=bars([(q.wrong_labels, q.mislabelled) for q in story.quality]),
    )


def _curve(losses: tuple[float, ...]) -> str:
    """Points of an SVG polyline, loss over epochs, in a box of `_WIDTH` x `_HEIGHT`."""
    top = max(losses, default=1.0) or 1.0
    step = _WIDTH / max(len(losses) - 1, 1)
    return " ".join(f"{i * step:.1f},{_HEIGHT - loss / top * _HEIGHT:.1f}" for i, loss in enumerate(losses))
