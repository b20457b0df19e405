"""`caltrain demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from caltrain.cli.output import Format, FormatOption, choose, console, emit, wants_json
from caltrain.presets import PresetName

Form = Literal["ternary", "two-way"]


def demo(
    data: Annotated[PresetName, typer.Option(help="which records")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="where the data set lies; digits need none")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="fetch mnist or cifar10 from their official places")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder for everything that the demo makes")] = Path("caltrain-demo"),
    form: Annotated[Form, typer.Option(help="ternary: labels and loss stay in the enclave, too")] = "ternary",
    seed: Annotated[int, typer.Option(min=0, help="of who gets which record, and which are poisoned")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, max=10_000, help="fewer for a quick trial")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """The whole story on one machine: four parties, one enclave, one poisoned model, one traced culprit."""
    choose(format_)

    from caltrain.demo.story import tell  # noqa: PLC0415  # torch and scikit-learn, only for the demo
    from caltrain.reports.terminal import print_result  # noqa: PLC0415

    result = tell(
        data, console=console, out=out, data_dir=data_dir, download=download, form=form, seed=seed, epochs=epochs
    )
    if wants_json():
        emit(result)
    else:
        print_result(result, console)
