"""The demo's result as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from caltrain.demo.result import DemoResult


def print_result(result: DemoResult, console: Console) -> None:
    """One table: what was measured, with the protected and the plain figure side by side where there are two."""
    table = Table(title=f"CalTrain demo on {result.data} ({result.form}, simulated enclave)", title_justify="left")
    for heading in ("", "protected", "plain PyTorch"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("accuracy", f"{result.accuracy:.4f}", f"{result.plain_accuracy:.4f}")
    table.add_row("attack success", f"{result.attack_success:.4f}", f"{result.plain_attack_success:.4f}")
    table.add_row("weights identical, bit for bit", "yes" if result.weights_identical else "[bold red]NO[/]", "")
    table.add_section()
    table.add_row("records, of which planted", f"{result.records}, {result.poison_share:.2%}", "")
    table.add_row("triggered inputs traced", str(result.triggered_inputs), "")
    table.add_row("planted among the nine nearest", f"{result.trace_precision_at_9:.4f}", "")
    table.add_row(f"traces that name {result.culprit}, the culprit", f"{result.trace_contributor_accuracy:.4f}", "")
    table.add_row("mislabelled records found (AUROC)", f"{result.mislabel_auroc:.4f}", "")
    table.add_section()
    table.add_row("disclosures verified", f"{result.disclosures_verified} of {result.disclosures}", "")
    table.add_row("substitutes refused", f"{result.substitutions_refused} of {result.substitutions}", "")
    table.add_row("events in the chain", str(result.events), "")
    table.add_row("seconds", f"{result.seconds:.1f}", "")
    console.print(table)
    console.print("[yellow]simulated enclave:[/] its operator can read everything. center not audited.")
    console.print(f"report: {result.report}", soft_wrap=True)
