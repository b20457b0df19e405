"""Records to link: drawn, of two contributors with two shards each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from caltrain.accountability.planes import stored
from caltrain.accountability.segments import Batch
from caltrain.crypto.digests import digest
from caltrain.records.commitment import RecordRef

MODEL, OTHER_MODEL = digest("model/v1", b"one"), digest("model/v1", b"two")
SHARDS = (("alpha", "0" * 32), ("alpha", "1" * 32), ("beta", "2" * 32), ("beta", "3" * 32))
Known = dict[RecordRef, tuple[int, bytes, Tensor]]


def drawn(n: int, *, seed: int, dims: int = 16, classes: int = 3) -> tuple[Batch, Known]:
    """A batch of `n` records, and each by its reference: label, commitment, fingerprint as stored."""
    draw, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    rows = stored(torch.nn.functional.normalize(torch.randn(n, dims, generator=draw), dim=1))
    labels = [int(label) for label in numbers.integers(0, classes, n)]
    records = [RecordRef(*SHARDS[int(numbers.integers(4))], seed * 10_000 + i) for i in range(n)]
    commitments = [numbers.bytes(32) for _ in range(n)]
    known = {r: (y, h, f) for r, y, h, f in zip(records, labels, commitments, rows, strict=True)}
    return Batch.of(rows, labels, records, commitments), known


def queries(n: int, *, dims: int = 16, seed: int = 99) -> Tensor:
    """Fingerprints to ask about (n, dims)."""
    return torch.nn.functional.normalize(torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)), dim=1)


def nearest_of(known: Known, query: Tensor, k: int, labels: set[int] | None = None) -> list[tuple[RecordRef, float]]:
    """What a store should answer, one record at a time in float64."""
    found = [
        (float((fingerprint.double() - query.double()).norm()), reference)
        for reference, (label, _, fingerprint) in known.items()
        if labels is None or label in labels
    ]
    return [(reference, round(distance, 12)) for distance, reference in sorted(found, key=lambda pair: pair[0])[:k]]
