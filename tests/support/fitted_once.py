"""Most worlds have the same records and end with the same weights: what their hunts fit to them is fitted once."""

from __future__ import annotations

import hashlib

import pytest
from torch import Tensor

from caltrain.accountability import labels
from caltrain.accountability.regression import out_of_fold

_KNOWN: dict[str, Tensor] = {}


def _out_of_fold(x: Tensor, targets: Tensor, *, decay: float) -> Tensor:
    """As `regression.out_of_fold`, which is a function of these very bits."""
    given = hashlib.sha256(repr((x.shape, targets.shape, decay)).encode())
    for tensor in (x, targets):
        given.update(tensor.numpy().tobytes())
    key = given.hexdigest()
    if key not in _KNOWN:
        _KNOWN[key] = out_of_fold(x, targets, decay=decay)
    return _KNOWN[key].clone()


def fit_once() -> None:
    """From now on, in this process."""
    pytest.MonkeyPatch().setattr(labels, "out_of_fold", _out_of_fold)
