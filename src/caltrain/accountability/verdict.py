"""Who is responsible for mispredictions: nearest fingerprints against shares of the data (a stand-in)."""

from __future__ import annotations

import math

import torch

from caltrain.accountability.cases import Blame, Kind, Links, Mispredictions, Suspects, Verdict, Witness
from caltrain.accountability.neighbours import nearest_in_class

_NEAR = 9


def judge(links: Links, mispredictions: Mispredictions, witness: Witness) -> Verdict:
    """The contributor of more of the nearest records than its share of data explains."""
    found = [
        nearest_in_class(q, label=int(y), fingerprints=links.fingerprints, labels=links.labels, k=_NEAR)[0]
        for q, y in zip(mispredictions.fingerprints, mispredictions.predicted, strict=True)
    ]
    rows = torch.unique(torch.cat(found))
    own = witness.testify(rows, without=frozenset())[torch.arange(len(rows)), links.labels[rows]]
    rows = rows[own.argsort()]
    blames = []
    for c in range(len(links.contributors)):
        share = float((links.sources == c).float().mean())
        near = int((links.sources[rows] == c).sum())
        p = sum(math.comb(len(rows), i) * share**i * (1 - share) ** (len(rows) - i) for i in range(near, len(rows) + 1))
        blames.append(Blame(c, near / max(1, len(rows)), share, min(1.0, p), min(1.0, p * len(links.contributors))))
    named = tuple(b.contributor for b in blames if b.adjusted < 0.05)
    rows = rows[torch.isin(links.sources[rows], torch.tensor(named, dtype=torch.int64))]
    return Verdict(
        outcome="responsible" if named else "cannot-tell",
        contributors=named,
        blames=tuple(blames),
        kinds=tuple(_hard() for _ in found),
        suspects=Suspects(rows, 0.5 if named else 0.0, 0.0, 1.0),
        reason="nearest records against shares of the data",
    )


def _hard() -> Kind:
    return "hard"
