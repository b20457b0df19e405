"""From mispredictions to a contributor and its records, or to "cannot tell".

Nearness alone accuses wrongly: the neighbours of an honest mistake are hard records, of whoever has most of them
nearby. An accusation takes two things, and both come from the records, not from the one who asks:

  (1) near the mispredictions, records whose content contradicts their label are one contributor's more often than its
      share of the class, over all sizes of neighbourhood, classes and contributors (`scan`, Holm);
  (2) those records, and all that are of a kind with them (`subset`), contradict their labels more than the others'
      nearest records do, even where the witness is the more lenient: once it has not seen the accused, once it has
      seen all but these records and what may be like them. So a contributor whose pictures merely look different is
      not blamed for that.

There are several witnesses (`witness`), of whom any may bear both out; that there are several is corrected for. One
counts only against somebody whose kind of pictures it knows: either the accused's records of other classes cannot be
told from other contributors', or it gets them right nearly as often (`_knows`).

Accomplices vouch for one another, so (1) is looked for without those of whom most is near, too: without their records,
before a witness that never saw them. A misprediction that lies with the rest of its class and not with the suspects is
not theirs. What passes (1) alone is answered with "cannot tell": poison whose labels are right, or honest records that
only one contributor has. What passes neither has no record behind it: a mistake, or a model that the host has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import Tensor

from caltrain.accountability.cases import (
    Blame,
    Dossier,
    Heard,
    Mispredictions,
    Suspects,
    Verdict,
    doubt,
)
from caltrain.accountability.kinds import CAUSED, kinds_of
from caltrain.accountability.scan import SMALLEST, Look, holm, orders, scan, strongest
from caltrain.accountability.subset import grow, none, together

ALPHA = 1e-3
_NEAREST = 100
_PARTNERS = 2
_CONTRADICTED = 0.25  # of the accused records, by more than they contradict them compared with others'
_LOOKED_AT = 1000
_DISTINCT = 0.7
_COMPETENT = 0.8
_COMPARED = 30  # records of others that an accused's are held against, at least


def judge(dossier: Dossier, asked: Mispredictions, *, alpha: float = ALPHA) -> Verdict:
    """Who is responsible for these mispredictions, with which records. Needs at least one misprediction."""
    classes = [each for label in sorted(set(asked.predicted.tolist())) for each in _Class.by_all(dossier, asked, label)]
    looks = [(each, look) for each in classes for look in each.looks]
    adjusted = holm(np.array([look.p_value for _, look in looks]))
    accused: dict[_Class, list[Look]] = {each: [] for each in classes}
    for (each, look), p_value in zip(looks, adjusted, strict=True):
        if p_value <= alpha:
            accused[each].append(look)
    found = [each.suspects(accused[each], alpha) for each in classes]
    kinds = kinds_of(dossier, asked, suspects=torch.cat([f.rows for f in found]))
    # Records that stand accused, but that no misprediction is near, are no cause of any of these.
    causes = {label for label, kind in zip(asked.predicted.tolist(), kinds, strict=True) if kind in CAUSED}
    suspects = together([f for each, f in zip(classes, found, strict=True) if each.label in causes])
    blamed = tuple(sorted(set(dossier.links.sources[suspects.rows].tolist())))
    return Verdict(
        outcome="responsible" if blamed else "cannot-tell",
        contributors=blamed,
        blames=_blames(looks, adjusted, len(dossier.links.contributors)),
        kinds=kinds,
        suspects=suspects,
        reason=_reason(blamed, near=any(accused.values()), found=any(len(f.rows) for f in found)),
    )


@dataclass(frozen=True, eq=False)
class _Class:
    """The records of one predicted class (rows (n,)), how near they are to the queries, what one witness says of them.

    And whose are the nearest of those whose labels it doubts.
    """

    heard: Heard
    label: int
    rows: Tensor
    near: tuple[Tensor, ...]
    looks: tuple[Look, ...]

    @classmethod
    def by_all(cls, dossier: Dossier, asked: Mispredictions, label: int) -> list[_Class]:
        """The class before each witness."""
        links = dossier.links
        rows = (links.labels == label).nonzero().squeeze(1)
        near = orders(asked.fingerprints[asked.predicted == label], links.fingerprints[rows])
        return [cls(heard, label, rows, near, ()).looked_at() for heard in dossier.heard]

    def looked_at(self) -> _Class:
        """With the strongest look at each contributor, with all others there or without a partner."""
        without = (frozenset[int](), *self.partners())
        return replace(self, looks=strongest([self.scanned(partners) for partners in without]))

    @property
    def sources(self) -> Tensor:
        """Whose the records are (n,)."""
        return self.heard.links.sources[self.rows]

    def partners(self) -> list[frozenset[int]]:
        """Those of whom most is near: each may have vouched for an accomplice. Nobody, where only two contribute."""
        count = len(self.heard.links.contributors)
        nearest = self.sources[torch.argsort(self.near[0], stable=True)[:_NEAREST]]
        most = torch.argsort(torch.bincount(nearest, minlength=count), descending=True, stable=True)
        return [frozenset({c}) for c in most[: max(0, min(_PARTNERS, count - 2))].tolist()]

    def scanned(self, without: frozenset[int]) -> tuple[Look, ...]:
        """The class without these contributors: without their records, and before a witness that never saw them."""
        there = ~torch.isin(self.sources, torch.tensor(sorted(without), dtype=torch.int64))
        return scan(
            tuple(values[there] for values in self.near),
            self.doubts(without)[there] > 0,
            self.sources[there],
            contributors=len(self.heard.links.contributors),
        )

    def doubts(self, without: frozenset[int]) -> Tensor:
        """How much each label is doubted (n,) by a witness that saw neither its contributor nor these."""
        found = self.heard.doubt[self.rows]
        for contributor in sorted(set(self.sources.tolist())) if without else ():
            own = self.rows[self.sources == contributor]
            said = self.heard.witness.testify(own, without=without | {contributor})
            found[self.sources == contributor] = doubt(said, self.heard.links.labels[own])
        return found

    def suspects(self, accused: list[Look], alpha: float) -> Suspects:
        """The records of the accused that stand up to both witnesses, by their rows among all."""
        if not accused:
            return none()
        own = torch.isin(self.sources, torch.tensor([look.contributor for look in accused]))
        doubt = self.doubts(frozenset(self.sources[own].tolist()) if len(accused) > 1 else frozenset())
        seeds = self._seeds(doubt > 0, max(look.size for look in accused))
        found, like = grow(self.heard.links.fingerprints[self.rows], doubt, seeds=seeds, accused=own)
        guilty = [look.contributor for look in accused if self._stands(found.rows, like, look.contributor, own, alpha)]
        kept = torch.isin(self.sources[found.rows], torch.tensor(guilty, dtype=torch.int64))
        rows = self.rows[found.rows[kept]]
        return Suspects(rows, found.precision, found.low, found.high) if guilty else none()

    def _seeds(self, contradicted: Tensor, size: int) -> Tensor:
        """The nearest contradicted records by either order, as a mask (n,)."""
        seeds = torch.zeros(len(self.rows), dtype=torch.bool)
        places = contradicted.nonzero().squeeze(1)
        for values in self.near:
            seeds[places[torch.argsort(values[places], stable=True)[:size]]] = True
        return seeds

    def _stands(self, found: Tensor, like: Tensor, contributor: int, accused: Tensor, alpha: float) -> bool:
        """Whether the contributor's records among `found` contradict their labels more than the others' nearest do.

        The more lenient witness forgets all that may be `like` them: one that is left can vouch for a hundred.
        """
        own = self.rows[found[self.sources[found] == contributor]]
        others = (~accused).nonzero().squeeze(1)
        nearest = others[torch.argsort(self.near[0][others])[: max(_COMPARED, len(own))]]
        if min(len(own), len(nearest)) < SMALLEST or not self._knows(contributor, accused):
            return False
        witness, labels = self.heard.witness, self.heard.links.labels[own]
        heard = (
            witness.testify(own, without=frozenset(self.sources[accused].tolist())),
            witness.testify(own, forget=self.rows[like]),
        )
        doubts = torch.stack([doubt(said, labels) for said in heard]).min(0).values
        if float((doubts > 0).float().mean()) < _CONTRADICTED:
            return False
        theirs = self.heard.doubt[self.rows[nearest]]
        return bool(mannwhitneyu(doubts, theirs, alternative="greater").pvalue <= alpha)

    def _knows(self, contributor: int, accused: Tensor) -> bool:
        """Whether the witness knows the contributor's kind of pictures, by its records of other classes."""
        named = contributor, self.label, frozenset(self.sources[accused].tolist())
        if named not in self.heard.knows:
            self.heard.knows[named] = self._compared(*named)
        return self.heard.knows[named]

    def _compared(self, contributor: int, label: int, accused: frozenset[int]) -> bool:
        links = self.heard.links
        names = torch.tensor(sorted({contributor, *accused}))
        elsewhere = links.labels != label
        own = (elsewhere & (links.sources == contributor)).nonzero().squeeze(1)
        others = (elsewhere & ~torch.isin(links.sources, names)).nonzero().squeeze(1)
        one, other = _alike(links.labels, own, others)
        if len(one) < _COMPARED:
            return False
        if self.heard.witness.tells_apart(one, other) < _DISTINCT:
            return True
        several = len(set(links.labels.tolist())) > 2  # of two classes it may call everything the other one
        rates = [_right(self.heard.said[rows], links.labels[rows]) for rows in (one, other)]
        return several and rates[0] >= _COMPETENT * rates[1]


def _alike(labels: Tensor, own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of two sets of rows as many of each label, at most `_LOOKED_AT` each, spread over all."""
    one, other = [], []
    for label in sorted(set(labels[own].tolist())):
        mine, theirs = own[labels[own] == label], others[labels[others] == label]
        count = min(len(mine), len(theirs), max(1, _LOOKED_AT * len(mine) // len(own)))
        if count:
            one.append(mine[:: len(mine) // count][:count])
            other.append(theirs[:: len(theirs) // count][:count])
    nothing = torch.empty(0, dtype=torch.int64)
    return torch.cat([nothing, *one]), torch.cat([nothing, *other])


def _right(said: Tensor, labels: Tensor) -> float:
    """How often a witness is right, mean over labels."""
    right = (said.argmax(1) == labels).float()
    found = [float(right[labels == label].mean()) for label in sorted(set(labels.tolist()))]
    return sum(found) / max(1, len(found))


def _blames(looks: list[tuple[_Class, Look]], adjusted: NDArray[np.float64], contributors: int) -> tuple[Blame, ...]:
    """Of every contributor its strongest look over all classes."""
    best: dict[int, Blame] = {}
    for (each, look), p_value in zip(looks, adjusted, strict=True):
        share = float((each.sources == look.contributor).float().mean()) if len(each.rows) else 0.0
        blame = Blame(look.contributor, look.own / max(1, look.size), share, look.p_value, float(p_value))
        if look.contributor not in best or blame.p_value < best[look.contributor].p_value:
            best[look.contributor] = blame
    return tuple(best[c] for c in range(contributors))


def _reason(blamed: tuple[int, ...], *, near: bool, found: bool) -> str:
    if blamed:
        return "nearby records that contradict their labels are these contributors' beyond their share"
    if found:
        return "records of the class contradict their labels, but the mispredictions do not lie with them"
    if near:
        return "nearby records are one contributor's beyond its share, but nothing shows that their labels are wrong"
    return "no contributor's records are behind the mispredictions beyond its share of the data"
