"""`caltrain demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caltrain.cli.output import Format, FormatOption, choose, console, emit, wants_json

Form = Annotated[str, typer.Option(help="ternary or two-way")]


def demo(
    data: Annotated[str, typer.Option(help="digits, mnist, cifar10, pneumoniamnist")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="where the data set lies; digits need none")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="fetch mnist or cifar10 from their official places")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder for everything that the demo makes")] = Path("caltrain-demo"),
    form: Form = "ternary",
    seed: Annotated[int, typer.Option(help="of the demo's own choices: who gets which record, which are poisoned")] = 0,
    format_: FormatOption = Format.TEXT,
) -> None:
    """The whole story on one machine: four parties, one enclave, one poisoned model, one traced culprit."""
    from caltrain.demo.story import tell  # noqa: PLC0415  # torch and scikit-learn, only for the demo
    from caltrain.reports.terminal import print_result  # noqa: PLC0415

    choose(format_)
    result = tell(data, data_dir=data_dir, download=download, out=out, form=form, seed=seed)
    if wants_json():
        emit(result)
    else:
        print_result(result, console)
