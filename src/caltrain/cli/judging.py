"""The judge of `caltrain party assess`: torch and the attacks, loaded when they are needed, under a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from caltrain.cli.output import console
from caltrain.exposure.figures import BudgetName
from caltrain.exposure.party_report import PartyReport
from caltrain.participant.assess import Judge, Records
from caltrain.plan import ExposureSpec, Plan


@contextmanager
def judging(budget: BudgetName, *, wheel: bytes | None = None) -> Iterator[Judge]:
    """A judge that attacks with that budget; for a plan with stages, their wheel."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("waiting", total=None)

        def judge(
            plan: Plan, spec: ExposureSpec, weights: bytes, cuts: tuple[int, ...], records: Records
        ) -> PartyReport:
            from caltrain.exposure.judge import judge as attack  # noqa: PLC0415  # torch
            from caltrain.exposure.subject import subject_of  # noqa: PLC0415
            from caltrain.models.weights import decode_state  # noqa: PLC0415
            from caltrain.models.wheel import stages_of  # noqa: PLC0415

            state = decode_state(weights, step="assess")
            return attack(
                subject_of(plan.model, plan.data, state, factory=stages_of(wheel, plan.model)),
                cuts,
                records,
                spec.policy,
                budget=budget,
                seed=int.from_bytes(os.urandom(4)),
                on_step=lambda what, done, of: progress.update(task, description=what, completed=done, total=of),
            )

        yield judge
