"""What `caltrain exposure assess` does behind its options: torch and the attacks, under a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from caltrain.cli.output import console
from caltrain.exposure.asked import Asked, check_asked
from caltrain.exposure.assess import Assessor, Gallery
from caltrain.exposure.material import Material, gather
from caltrain.exposure.open_data import open_records
from caltrain.exposure.open_model import open_subject, save_subject
from caltrain.exposure.report import ExposureReport
from caltrain.exposure.subject import Subject
from caltrain.exposure.train_validator import train_validator
from caltrain.exposure.validator import Validator, validator_of

OnStep = Callable[[str, int, int], None]


class Source(NamedTuple):
    """Model and records as options name them."""

    model: Path
    weights: Path | None
    wheel: bytes | None
    data: str
    data_dir: Path | None
    targets: int
    candidates: int
    own: int


@dataclass
class Validating:
    """Who judges maps: `generator`, a model's path, or, where nothing is named, one that is trained into `folder`."""

    named: str
    folder: Path
    threads: int
    trained: bool = False

    def validator(self, subject: Subject, material: Material, asked: Asked, on_step: OnStep) -> Validator | None:
        """None is the model itself."""
        if self.named == "generator" or (not self.named and "kl" not in asked.attacks):
            return None
        if self.named:
            return validator_of(open_subject(Path(self.named)), subject, material.candidates, material.labels)
        made = train_validator(
            subject,
            material,
            seed=asked.seed,
            threads=self.threads,
            on_step=lambda done, of: on_step("training a validator", done, of),
        )
        save_subject(made.subject, self.folder)
        self.trained = True
        return made


def assessed(
    source: Source, asked: Asked, validating: Validating, *, on_step: OnStep
) -> tuple[ExposureReport, Gallery]:
    """Open, check, assess. Nothing long runs before everything that was asked for is known to make sense."""
    torch.set_num_threads(validating.threads)
    subject = open_subject(source.model, weights=source.weights, wheel=source.wheel)
    own, others = open_records(source.data, subject.data, folder=source.data_dir)
    material = gather(
        subject,
        own,
        others,
        targets=source.targets,
        candidates=source.candidates,
        most_own=source.own,
        seed=asked.seed,
    )
    check_asked(subject, asked, material)
    validator = validating.validator(subject, material, asked, on_step)
    assessor = Assessor(subject, material, asked, validator=validator, clock=time.perf_counter, on_step=on_step)
    return assessor.run(data=source.data, threads=validating.threads), assessor.gallery


@contextmanager
def ticking() -> Iterator[OnStep]:
    """A progress bar that says what goes on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("opening model and data", total=None)
        yield lambda what, done, of: progress.update(task, description=what, completed=done, total=of)
