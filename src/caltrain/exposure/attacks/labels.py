"""What crosses tells of labels and other properties: groups by clustering, names by a probe.

Rows are one a record (N, D). Who *clusters* needs no label, and one of each class to name the groups; who *probes* has
records of its own with theirs, as a party in league with the host has. IRs and gradients at a shallow cut are large:
`reduced` averages over places until at most 4,096 numbers are left, so figures say at least how much is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from caltrain.errors import DataError
from caltrain.exposure.figures import Estimate
from caltrain.exposure.material import Material
from caltrain.exposure.statistics import mean_estimate, rate_estimate
from caltrain.exposure.subject import Cut, Live, Subject, candidate_cuts, check_finite, stacked

MOST_NUMBERS = 4096
KNOWN = (1, 5)
_DRAWS = 20
_MOST_OWN = 1000
_BATCH = 100
_PENALTIES = tuple(float(x) for x in np.logspace(0, 6, 7))
Numbers = NDArray[np.int64]
OnStep = Callable[[int, int], None]


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The share of the other records named rightly by who knows the labels of `known` of each class."""

    known: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
    right: Estimate


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The share of records of which something is told rightly; `floor`: by always saying what is most frequent."""

    right: Estimate
    floor: float


class Groups(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`purity`: the share of records with their cluster's most frequent label.

    `floor`: the same for clusters of these sizes drawn at random, which is what knowing nothing gives.
    """

    purity: Estimate
    floor: float
    named: tuple[Named, ...]


class LabelFigures(Groups, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Besides the groups: label and brightness by a probe on one's own records, the label by the rest of the model.

    `bright` asks for more than the median brightness: a property that has no label and that nobody trained for.
    `gradients`: the groups in what comes back at this cut in two-way training.
    """

    gradients: Groups
    probe: Told
    bright: Told
    rest: Told


def assess_labels(
    cut: Cut, material: Material, *, seed: int, on_step: OnStep = lambda _done, _of: None
) -> LabelFigures:
    """What IRs and gradients of `material.targets` tell of them. Raises as `gradient_groups` does."""
    own, own_labels = material.own[:_MOST_OWN], material.own_labels[:_MOST_OWN].numpy()
    mine, theirs = torch.split(own, _BATCH), torch.split(material.targets, _BATCH)
    rows, answers = [], []
    with torch.inference_mode():
        for number, part in enumerate((*mine, *theirs)):
            live = cut.ir(part)
            rows.append(reduced(live))
            if number >= len(mine):
                answers.append(cut.answer(live).argmax(1))
            on_step(number + 1, len(mine) + len(theirs))
    all_rows, truth = torch.cat(rows), material.target_labels.numpy()
    own_rows, target_rows = all_rows[: len(own)], all_rows[len(own) :]
    found = _grouped(target_rows, cut, material, seed)
    middle = _brightness(own).median()
    bright = [(_brightness(pictures) > middle).numpy() for pictures in (own, material.targets)]
    return LabelFigures(
        purity=found.purity,
        floor=found.floor,
        named=found.named,
        gradients=gradient_groups(cut, material, seed=seed),
        probe=property_accuracy(own_rows, own_labels, target_rows, truth),
        bright=property_accuracy(own_rows, bright[0], target_rows, bright[1]),
        rest=_told(torch.cat(answers).numpy(), truth),
    )


def label_groups(
    rows: Tensor, labels: ArrayLike, *, classes: int, known: Sequence[int] = KNOWN, seed: int = 0
) -> Groups:
    """Cluster rows (N, D), scaled to length one, by k-means into `classes`, and compare with the labels (N,).

    `named`: mean and interval over 20 draws of the records whose labels are known; each cluster is called by the
    majority of those in it, and one without any gets no name. Of a class with few records at most half are known.
    Raises DataError `exposure.too-few` for fewer records than twice the classes.
    """
    truth, rng = _numbers(labels), np.random.default_rng(seed)
    check_enough(len(truth), classes)
    unit = F.normalize(rows.flatten(1), dim=1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters: that is a finding
        clusters = KMeans(classes, n_init=3, random_state=seed).fit_predict(unit).astype(np.int64)
    return Groups(
        purity=rate_estimate(int(in_majority(clusters, truth)), len(truth)),
        floor=float(np.mean([in_majority(rng.permutation(clusters), truth) for _ in range(_DRAWS)])) / len(truth),
        named=tuple(
            Named(k, mean_estimate([share_named(clusters, truth, known=k, rng=rng) for _ in range(_DRAWS)], seed=seed))
            for k in known
        ),
    )


def check_enough(records: int, classes: int) -> None:
    """Raise DataError `exposure.too-few` for fewer records than twice the classes."""
    if records < 2 * classes:
        raise DataError(
            "exposure.too-few",
            f"{records} records cannot be grouped into {classes} classes",
            step="group by label",
            fix=f"Give at least {2 * classes}; some dozens a class make figures that are of use.",
        )


def in_majority(clusters: Numbers, labels: Numbers) -> int:
    """How many records have their cluster's most frequent label."""
    return sum(int(np.bincount(labels[clusters == c]).max()) for c in np.unique(clusters))


def share_named(clusters: Numbers, labels: Numbers, *, known: int, rng: np.random.Generator) -> float:
    """Share of the other records named rightly by `known` records of each class (at most half of it), drawn."""
    classes = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    given = np.concatenate([rng.choice(c, min(known, (len(c) + 1) // 2), replace=False) for c in classes])
    names = np.full(clusters.max() + 1, -1)
    for cluster in np.unique(clusters[given]):
        names[cluster] = np.bincount(labels[given][clusters[given] == cluster]).argmax()
    rest = np.setdiff1d(np.arange(len(labels)), given)
    return float(np.mean(names[clusters[rest]] == labels[rest]))


def property_accuracy(
    own_rows: Tensor, own_property: ArrayLike, target_rows: Tensor, target_property: ArrayLike
) -> Told:
    """A property (N,) of others' records by a linear probe on one's own: any whole numbers, labels or yes and no.

    Ridge regression on standardised rows; its penalty is the one that leaves out one's own records best. Where one's
    own records are all alike, that is the answer. Raises DataError `exposure.no-interval` without targets.
    """
    own, truth = _numbers(own_property), _numbers(target_property)
    if len(np.unique(own)) < 2:
        return _told(np.full(len(truth), own[0]), truth)
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=_PENALTIES))
    probe.fit(own_rows.flatten(1).numpy(), own)
    return _told(probe.predict(target_rows.flatten(1).numpy()), truth)


def _told(answers: Any, truth: Numbers) -> Told:
    right = rate_estimate(int(np.count_nonzero(answers == truth)), len(truth))
    return Told(right, float(np.unique(truth, return_counts=True)[1].max()) / len(truth))


def reduced(live: Live, *, most: int = MOST_NUMBERS) -> Tensor:
    """What crosses as rows (N, D): planes averaged to squares until D is `most` at most, or one number a plane."""
    planes = stacked(live)
    height, width = planes.shape[2:]
    side = max(1, int((most / planes.shape[1]) ** 0.5))
    if planes[0].numel() > most:
        planes = F.adaptive_avg_pool2d(planes, (min(side, height), min(side, width)))
    return planes.flatten(1)


def gradients(cut: Cut, pictures: Tensor, labels: Tensor) -> Live:
    """What comes back in the two-way form: the gradient of each record's loss by its IR, for the model as it is.

    The model is as when it answers, so no record's gradient depends on the others of its batch.
    """
    live = tuple(tensor.detach().requires_grad_() for tensor in cut.ir(pictures))
    loss = F.cross_entropy(cut.answer(live), labels, reduction="sum")
    return torch.autograd.grad(loss, live)


def gradient_groups(cut: Cut, material: Material, *, seed: int) -> Groups:
    """The groups that k-means finds in the gradients of `material.targets`.

    Raises as `label_groups` does, and IntegrityError `exposure.not-finite`.
    """
    parts = torch.split(material.targets, _BATCH), torch.split(material.target_labels, _BATCH)
    rows = torch.cat([reduced(gradients(cut, *part)) for part in zip(*parts, strict=True)])
    check_finite(rows, f"the gradient at cut {cut.front}")
    return _grouped(rows, cut, material, seed)


def head_groups(subject: Subject, material: Material, *, seed: int) -> Groups:
    """The groups in what goes out in ternary training: gradients at the input of the least HeadNet that there can be.

    It has the last layer with weights. Where the FrontNet ends does not matter. Raises as `gradient_groups` does.
    """
    return gradient_groups(Cut(subject, candidate_cuts(subject.spec)[-1]), material, seed=seed)


def ir_groups(cut: Cut, material: Material, *, seed: int) -> Groups:
    """The groups that k-means finds in the IRs of `material.targets`. Raises as `label_groups` does."""
    with torch.inference_mode():
        rows = torch.cat([reduced(cut.ir(part)) for part in torch.split(material.targets, _BATCH)])
    return _grouped(rows, cut, material, seed)


def _grouped(rows: Tensor, cut: Cut, material: Material, seed: int) -> Groups:
    return label_groups(rows, material.target_labels.numpy(), classes=len(cut.subject.data.classes), seed=seed)


def _brightness(pictures: Tensor) -> Tensor:
    return pictures.flatten(1).mean(1)


def _numbers(values: ArrayLike) -> Numbers:
    return np.asarray(values).astype(np.int64)
