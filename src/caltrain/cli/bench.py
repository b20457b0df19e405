"""`caltrain bench ...`: measurements that anybody can repeat."""

from __future__ import annotations

from typing import Annotated

import typer

from caltrain.cli.output import Format, FormatOption, choose, emit

app = typer.Typer(help="Measure; see docs/ for the figures and what they mean.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A group even while it holds one command."""


@app.command()
def sealing(
    records: Annotated[int, typer.Option(min=100, help="records of each kind")] = 20_000,
    repeats: Annotated[int, typer.Option(min=1, help="paired repeats")] = 5,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Sealed shards beside raw AES-GCM and encrypted Parquet."""
    from caltrain.bench.sealing import run  # noqa: PLC0415  # pyarrow, only where it is needed

    choose(format_)
    emit(run(records=records, repeats=repeats), title="Sealing")
