"""`caltrain verdict`: who is responsible for a model's errors, if that can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from caltrain.auditor.collect import collect_bundle
from caltrain.cli.files import read_named, write_json
from caltrain.cli.output import Format, FormatOption, choose, console, emit, say_simulated
from caltrain.cli.query import HomeOption, InputsArgument, PlanOption, PolicyOption, UrlOption, ask_enclave
from caltrain.cli.verdict_text import TOLD, show, summary
from caltrain.host_client import HostClient
from caltrain.reports.progress import waiting


def verdict(
    inputs: InputsArgument,
    url: UrlOption,
    home: HomeOption = None,
    plan: PlanOption = None,
    policy: PolicyOption = None,
    out: Annotated[Path | None, typer.Option(help="folder for the signed verdict and its bundle")] = None,
    report: Annotated[Path | None, typer.Option(help="the verdict as one HTML page, for people")] = None,
    format_: FormatOption = Format.TEXT,
) -> None:
    """Ask who is responsible for a batch of mispredicted inputs. Each of them counts against the budget."""
    choose(format_)
    array, names = read_named(inputs)
    with waiting(console, "the enclave looks at all records"):
        answered, agreed = ask_enclave("verdict", array, url, home, plan, policy)
    (envelope,), (said,) = answered.envelopes, answered.verdicts
    if out is not None:
        write_json(out / "verdict.json", envelope)
        with HostClient(url) as host:
            write_json(out / "bundle.json", collect_bundle(host, agreed, envelope, evidence=answered.evidence))
    if answered.claims.simulated:
        say_simulated()
    show(said)
    if report is not None:
        from caltrain.reports.verdict import write_verdict  # noqa: PLC0415  # jinja2, only for a page

        write_verdict(report, said, names=names, classes=agreed.data.classes)
    emit(summary(said) | {"budget_left": answered.answers.budget_left}, title="Verdict", told=TOLD)
