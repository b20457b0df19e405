"""What a repair changed: models before and after it, and those that never saw the records. Imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from caltrain.errors import DataError
from caltrain.exposure.subject import Subject
from caltrain.records.readers.npz import read_arrays
from caltrain.training.batches import center_crop, normalise

_BATCH = 256
_NAMES = ("clean", "labels", "triggered")
_STEP = "compare models"


@dataclass(frozen=True)
class Trials:
    """Test records (N, C, H, W), their labels (N,), and the same records with the trigger."""

    clean: NDArray[np.generic]
    labels: NDArray[np.int64]
    triggered: NDArray[np.generic]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Share of clean records that are predicted right; of triggered ones of other classes, as the target."""

    accuracy: float
    attack_success: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Means over `pairs` models of each kind, and of the paired differences: after the repair less never poisoned."""

    pairs: int
    before: Figures
    after: Figures
    never: Figures | None
    attack_success_above_never: float | None
    accuracy_below_never: float | None


def read_trials(path: Path) -> Trials:
    """An .npz of `clean`, `labels` and `triggered`. Raises DataError `compare.inputs`, `reader.*`."""
    clean, labels, triggered = read_arrays(path, _NAMES)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise _unfit(f"labels of {labels.shape} {labels.dtype}, not one integer a record")
    if clean.shape != triggered.shape or len(clean) != len(labels):
        raise _unfit(f"{clean.shape} clean, {triggered.shape} triggered, {labels.shape} labels")
    return Trials(clean, labels.astype(np.int64), triggered)


def figures_of(subject: Subject, trials: Trials, *, target: int) -> Figures:
    """Both shares of one model. Raises DataError `compare.inputs`."""
    others = trials.labels != target
    if not others.any():
        raise _unfit("no test record is of another class than the target: no attack can be seen to succeed")
    right = _predicted(subject, trials.clean) == trials.labels
    fooled = _predicted(subject, trials.triggered[others]) == target
    return Figures(accuracy=float(right.mean()), attack_success=float(fooled.mean()))


def compare(before: Sequence[Figures], after: Sequence[Figures], never: Sequence[Figures] = ()) -> Comparison:
    """Of each kind equally many models (of `never` none, or as many), paired in their order."""
    pairs = [*zip(after, never, strict=True)] if never else []
    return Comparison(
        pairs=len(after),
        before=_mean(before),
        after=_mean(after),
        never=_mean(never) if pairs else None,
        attack_success_above_never=fmean(a.attack_success - n.attack_success for a, n in pairs) if pairs else None,
        accuracy_below_never=fmean(n.accuracy - a.accuracy for a, n in pairs) if pairs else None,
    )


def _mean(figures: Sequence[Figures]) -> Figures:
    return Figures(accuracy=fmean(f.accuracy for f in figures), attack_success=fmean(f.attack_success for f in figures))


def _predicted(subject: Subject, records: NDArray[np.generic]) -> NDArray[np.int64]:
    """Classes (N,)."""
    data = subject.data
    if records.shape[1:] != data.shape or records.dtype != data.numpy_dtype:
        raise _unfit(f"records of {records.shape} {records.dtype}, the model takes {data.shape} {data.dtype}")
    found = []
    with torch.inference_mode():
        for start in range(0, len(records), _BATCH):
            part = center_crop(torch.from_numpy(np.array(records[start : start + _BATCH])), subject.spec.size)
            found.append(subject.module(normalise(part, data, channels_last=True)).argmax(1))
    classes: NDArray[np.int64] = torch.cat(found).numpy()
    return classes


def _unfit(what: str) -> DataError:
    return DataError(
        "compare.inputs",
        what,
        step=_STEP,
        fix="Give an .npz of clean and triggered records (N, C, H, W) as the models take them, and labels (N,).",
    )
