"""What is said of a row is said by a fit to other rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from caltrain.accountability.regression import FOLDS, fit, out_of_fold


def drawn(records: int = 120, *, classes: int = 3, dims: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, targets, true classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (records,), generator=generator)
    x = torch.randn((records, dims), generator=generator) + 3 * F.one_hot(labels, dims).float()
    return x, F.one_hot(labels, classes).float(), labels


@pytest.mark.parametrize("row", [0, 7, 58, 119])
def test_a_rows_own_target_says_nothing_of_it(row: int) -> None:
    x, targets, labels = drawn()
    changed = targets.clone()
    changed[row] = F.one_hot((labels[row] + 1) % 3, 3).float()
    before, after = out_of_fold(x, targets, decay=1e-3), out_of_fold(x, changed, decay=1e-3)
    same = torch.arange(len(x)) % FOLDS == row % FOLDS
    assert torch.equal(before[same], after[same]), "bit for bit: neither it nor its fold was fitted to"
    assert bool((before[~same] != after[~same]).any(1).all()), "the target was not used at all"


def test_rows_are_told_by_the_other_rows() -> None:
    x, targets, labels = drawn()
    said = out_of_fold(x, targets, decay=1e-3)
    assert torch.allclose(said.exp().sum(1), torch.ones(len(x)), atol=1e-5)
    assert float((said.argmax(1) == labels).float().mean()) > 0.9


def test_scale_and_place_of_a_column_do_not_matter() -> None:
    x, targets, _ = drawn()
    moved = x * torch.tensor([1.0, 100.0, 0.01, 1.0, 1.0, 1.0]) + torch.tensor([0.0, 5.0, 0.0, -9.0, 0.0, 0.0])
    assert torch.allclose(out_of_fold(moved, targets, decay=1e-2), out_of_fold(x, targets, decay=1e-2), atol=5e-3)


def test_targets_may_be_soft() -> None:
    x = torch.zeros((50, 2))
    targets = torch.tensor([[0.2, 0.5, 0.3]]).expand(50, -1).contiguous()
    assert torch.allclose(out_of_fold(x, targets, decay=0.0).exp(), targets, atol=1e-3)


def test_a_fit_is_where_the_penalised_likelihood_is_flat() -> None:
    x, targets, _ = drawn()
    weights = fit(x, targets, decay=1e-2).double()
    residue = (x.double() @ weights).softmax(1) - targets.double()
    gradient = x.double().T @ residue / len(x) + 2e-2 * weights
    assert float(gradient.abs().max()) < 1e-3
    assert not weights.requires_grad


def test_a_larger_penalty_makes_smaller_weights() -> None:
    x, targets, _ = drawn()
    assert fit(x, targets, decay=1.0).norm() < 0.5 * fit(x, targets, decay=1e-3).norm()


@pytest.mark.parametrize("records", [1, 2, 4])
def test_fewer_records_than_folds_have_finite_predictions(records: int) -> None:
    x, targets, _ = drawn(records)
    said = out_of_fold(x, targets, decay=1e-4)
    assert bool(said.isfinite().all())
    if records == 1:
        assert torch.allclose(said.exp(), torch.full((1, 3), 1 / 3)), "of one record alone nothing is known"
