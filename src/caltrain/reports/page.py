"""HTML pages from templates: every text is escaped, nothing is loaded from outside, nothing runs."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from caltrain.files import write_whole
from caltrain.reports.pictures import data_uri
from caltrain.reports.terminal import center_note, in_words


def environment() -> Environment:
    """The templates of this package, with what all of them use."""
    found = Environment(
        loader=PackageLoader("caltrain.reports"), autoescape=select_autoescape(), undefined=StrictUndefined
    )
    found.globals["center_note"] = center_note
    found.filters |= {"data_uri": data_uri, "percent": percent, "interval": in_words}
    return found


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template to `path`. Raises EnvironmentFault `file.not-written`."""
    write_whole(path, environment().get_template(template).render(**values).encode())


def percent(share: float) -> str:
    """`12.5%`."""
    return f"{share:.1%}"
