"""scikit-learn's digits: 1,797 grey 8x8 pictures that come inside its wheel, so nothing is downloaded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from caltrain.records.readers.dataset import Split, build_split

_TEST = 450
_SEED = 20180700  # fixed for good: figures that were published with this split stay comparable


def read_digits() -> Split:
    """1,347 records to train, 450 to test, (1, 8, 8); the values 0..16 become 0..240. Always the same split."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  # a slow import, for this set alone

    raw = load_digits()
    images: NDArray[np.uint8] = (raw.images * 15).astype(np.uint8)[:, np.newaxis]
    labels: NDArray[np.int64] = raw.target.astype(np.int64)
    test = _stratified(labels)
    return build_split((images[~test], labels[~test]), (images[test], labels[test]), class_names=None)


def _stratified(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which records are for testing: (N,) bool.

    Systematic sampling: with the records sorted by class and shuffled within it, every fourth or so is
    taken, so each class gets its share to within one. RandomState's stream is frozen (NumPy NEP 19).
    """
    count = len(labels)
    shuffled = np.random.RandomState(_SEED).permutation(count)
    order = np.lexsort((shuffled, labels))
    test = np.zeros(count, dtype=np.bool_)
    test[order[np.arange(_TEST) * count // _TEST]] = True
    return test
