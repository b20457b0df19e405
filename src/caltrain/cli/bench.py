"""`caltrain bench ...`: measurements that anybody can repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from caltrain.bench.training import TrainingReport, bench_preset, cuts_of, run
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say, wants_json
from caltrain.errors import ConfigError
from caltrain.exposure.figures import BudgetName
from caltrain.models.imagenet import NETWORKS
from caltrain.presets import Preset, StartName
from caltrain.reports.plot import line_plot
from caltrain.serving.package import Across, BatchSpec

if TYPE_CHECKING:
    from caltrain.bench.infer import InferenceReport

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


@app.command()
def train(
    model: Annotated[StartName, typer.Option(help="a preset's model")] = "cifar10-18-layer",
    cut: Annotated[int | None, typer.Option(min=0, help="layers in front; default the preset's")] = None,
    head: Annotated[int | None, typer.Option(min=1, help="layers of the HeadNet in the ternary form")] = None,
    batch: Annotated[int, typer.Option(min=1, help="records of a step")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="threads that compute, on either side")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="paired repeats")] = 15,
    steps: Annotated[int, typer.Option(min=1, help="steps of each way in a round")] = 2,
    audit_rate: Annotated[float, typer.Option(min=0, max=1, help="share of the center's steps repeated inside")] = 0.0,
    sweep_cuts: Annotated[bool, typer.Option("--sweep-cuts", help="a long run: every second cut")] = False,
    plot: Annotated[Path | None, typer.Option(help="with --sweep-cuts: write the ratios as SVG")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Protected training beside plain PyTorch: speed, its ratio, and whether the weights are the same bits."""
    from caltrain.bench.identity import weights_identical  # noqa: PLC0415  # torch

    choose(format_)

    def preset_at(front: int | None) -> Preset:
        return bench_preset(model, cut=front, head=head, batch=batch, threads=threads, audit_rate=audit_rate)

    cuts = cuts_of(preset_at(cut)) if sweep_cuts else [cut]
    with _ticks(len(cuts) * (rounds + 1)) as tick:
        rows = []
        for front in cuts:
            preset = preset_at(front)
            same = weights_identical(preset)
            rows.append(run(model, preset, rounds=rounds, steps=steps, identical=same, on_round=tick))
    if plot is not None:
        plot.write_text(ratio_plot(rows), encoding="utf-8")
    emit({"cuts": rows} if sweep_cuts else rows[0], title="Training (simulated enclave)")


@app.command()
def exposure(
    model: Annotated[StartName, typer.Option(help="a preset's model, with random weights")] = "cifar10-18-layer",
    attacks: Annotated[str, typer.Option(help="of kl, whitebox, inverter, shadow, labels")] = "kl",
    cuts: Annotated[list[int], typer.Option(min=1, help="layers in front; repeat; default every cut")] = [],  # noqa: B006
    inputs: Annotated[int, typer.Option(min=8, help="inputs of KL")] = 256,
    maps: Annotated[int, typer.Option(min=0, help="maps that KL shows of each tensor; 0 is all")] = 64,
    targets: Annotated[int, typer.Option(min=8, help="pictures that are attacked")] = 32,
    budget: Annotated[BudgetName, typer.Option(help="how much the attacks may compute")] = "quick",
    threads: Annotated[int, typer.Option(min=1, help="threads that compute")] = 2,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Seconds that an exposure assessment takes, by cut and measure."""
    import time  # noqa: PLC0415

    from caltrain.bench.exposure import run as assess  # noqa: PLC0415  # torch
    from caltrain.cli.exposing import ticking  # noqa: PLC0415
    from caltrain.exposure.asked import Asked  # noqa: PLC0415

    choose(format_)
    asked = Asked(
        attacks=tuple(attacks.split(",")),
        cuts=tuple(cuts),
        budget=budget,
        maps=maps or None,
        kl_inputs=inputs,
    )
    with ticking() as on_step:
        report = assess(model, asked=asked, targets=targets, threads=threads, clock=time.perf_counter, on_step=on_step)
    emit(report, title="Exposure assessment")


@app.command()
def infer(
    models: Annotated[
        list[str],
        typer.Option("--model", help="a preset, darknet, extraction, densenet201, a .cfg or a folder; repeat"),
    ] = [],  # noqa: B006
    cuts: Annotated[list[int], typer.Option("--cut", min=1, help="layers in front; repeat")] = [4],  # noqa: B006
    head: Annotated[int, typer.Option(min=0, help="layers of the HeadNet; 0: two-way")] = 2,
    mapped: Annotated[bool, typer.Option("--mapped", help="the papers' class mapping unit inside")] = False,
    concurrency: Annotated[list[int], typer.Option(min=1, help="closed-loop clients; repeat; 1, 8 and 64")] = [],  # noqa: B006
    rows: Annotated[int, typer.Option(min=0, max=256, help="most records of a batch; 0: 32, ImageNet's 4")] = 0,
    fixed: Annotated[bool, typer.Option("--fixed", help="batches padded to one size")] = False,
    across: Annotated[Across, typer.Option(help="precision at the cuts")] = "f32",
    rounds: Annotated[int, typer.Option(min=1, help="paired repeats")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="of each way in a round")] = 8.0,
    threads: Annotated[int, typer.Option(min=1, help="threads that compute, on either side")] = 2,
    sweep_cuts: Annotated[
        bool, typer.Option("--sweep-cuts", help="a long run: cuts all over the papers' ImageNet networks, 8 clients")
    ] = False,
    most_cuts: Annotated[int, typer.Option(min=1, help="with --sweep-cuts: of each network")] = 12,
    plot: Annotated[Path | None, typer.Option(help="write the ratios by cut as SVG")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Protected inference beside plain PyTorch behind the same server: throughput, waits, and their ratio."""
    from caltrain.bench.contest import contest, subject_for, sweep_of  # noqa: PLC0415  # torch
    from caltrain.bench.infer import run as compare  # noqa: PLC0415

    choose(format_)
    clients = concurrency or ([8] if sweep_cuts else [1, 8, 64])
    found: list[InferenceReport] = []
    for name in models or (list(NETWORKS) if sweep_cuts else ["cifar10-18-layer"]):
        subject = subject_for(name)
        chosen = sweep_of(subject.spec, head, most=most_cuts) if sweep_cuts else cuts
        batch = BatchSpec(rows=rows or (4 if name in NETWORKS else 32), fixed=fixed)
        with _ticks(len(chosen) * len(clients) * (rounds + 1)) as tick:
            for front in chosen:
                made = contest(
                    subject,
                    name=name,
                    front=front,
                    head=head,
                    mapped=mapped,
                    batch=batch,
                    across=across,
                    threads=threads,
                )
                with made as pair:
                    found += compare(
                        pair, concurrency=clients, rounds=rounds, seconds=seconds, on_round=lambda: tick(0, 0)
                    )
    if plot is not None:
        plot.write_text(cost_plot(found), encoding="utf-8")
    emit({"rows": found}, title="Inference (simulated enclave)")


@app.command()
def trace(
    records: Annotated[int, typer.Option(min=9, help="linked records, of all classes")] = 1_000_000,
    dims: Annotated[int, typer.Option(min=1, help="numbers of a fingerprint")] = 256,
    classes: Annotated[int, typer.Option(min=1, help="classes; one is searched")] = 10,
    rounds: Annotated[int, typer.Option(min=2, help="queries of each way, in turns")] = 25,
    threads: Annotated[int, typer.Option(min=1, help="threads of each way")] = 2,
    folder: Annotated[Path | None, typer.Option(help="where the sealed store lies meanwhile")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """The sealed linkage store beside plain faiss: the nearest records inside one class, exactly."""
    from caltrain.bench.trace import run  # noqa: PLC0415  # torch

    choose(format_)
    report = run(records=records, dims=dims, classes=classes, rounds=rounds, threads=threads, folder=folder)
    emit(report, title="Trace")


@app.command()
def accountability(
    data: Annotated[str, typer.Option(help="cifar10, mnist, pneumoniamnist, digits, or the path of a set")] = "mnist",
    data_dir: Annotated[Path | None, typer.Option(help="where data sets are; default the cache")] = None,
    download: Annotated[bool, typer.Option("--download", help="bring the set there first")] = False,
    cases: Annotated[str, typer.Option(help="of the grid's cases, separated by commas; default all")] = "",
    shares: Annotated[str, typer.Option(help="of all records, that are tampered with; default 0.01")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="runs of a case; default 1, with --full 3")] = None,
    full: Annotated[bool, typer.Option("--full", help="a long run: all shares, three seeds, ten clean runs")] = False,
    remedy: Annotated[bool, typer.Option("--remedy", help="also retrain without what the verdict blames")] = False,
    records: Annotated[int | None, typer.Option(min=500, help="training records; default by data set")] = None,
    skew: Annotated[
        float | None, typer.Option(min=0.05, help="uneven contributors: a Dirichlet concentration; default even")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="runs at a time, of one thread each")] = 2,
    cache: Annotated[Path | None, typer.Option(help="where models and answers are kept; default the cache")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Verdicts beside the truth that was planted, and beside other methods. What was done is kept: it can go on."""
    from caltrain.bench.accountability import grid  # noqa: PLC0415  # torch
    from caltrain.bench.accountability.cache import default_folder  # noqa: PLC0415
    from caltrain.bench.accountability.jobs import Where  # noqa: PLC0415
    from caltrain.bench.accountability.telling import tables  # noqa: PLC0415

    choose(format_)
    jobs = grid.jobs_of(cases=_listed(cases), shares=_numbers(shares), seeds=seeds, full=full)
    where = Where(
        data=data,
        data_dir=str(data_dir) if data_dir else None,
        records=records,
        cache=str(cache or default_folder()),
        download=download,
        skew=skew,
    )
    with _ticks(grid.rounds(jobs, remedy=remedy)) as tick:
        report = grid.run(where, jobs, processes=processes, remedy=remedy, on_round=tick)
    if wants_json():
        emit(report)
    for table in tables(report):
        say(table)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _listed(text)]
    except ValueError:
        raise ConfigError(
            "bench.share", f"these are no shares: {text!r:.60}", step="bench accountability", fix="Give 0.01,0.05."
        ) from None


def cost_plot(rows: Sequence[InferenceReport]) -> str:
    """Throughput of protected over plain inference by the number of layers inside, a line a model and load, as SVG."""
    kinds = dict.fromkeys((row.model, row.concurrency) for row in rows)
    lines = {
        f"{model}, {clients} clients": [(row.cut, row.ratio) for row in rows if (row.model, row.concurrency) == kind]
        for kind in kinds
        for model, clients in [kind]
    }
    return line_plot(lines, title="throughput / plain", x="layers in front", y="ratio")


def ratio_plot(rows: Sequence[TrainingReport]) -> str:
    """Both ratios over the cut, as SVG."""
    lines = {
        "two-way": [(row.cut, row.ratio_two_way) for row in rows],
        "ternary": [(row.cut, row.ratio_ternary) for row in rows],
    }
    return line_plot(lines, title=f"{rows[0].model}: throughput / plain", x="layers in front", y="ratio")


@contextmanager
def _ticks(total: int) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("", total=total)
        yield lambda _done, _of: progress.advance(task)
