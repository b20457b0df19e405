"""Search everything that the host could see for everything that it must not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from support.canary_host import Haystack, Place
from support.canary_search import Hit, Index, LabelIndex, LabelVector, Needle, decimals, inflated


@dataclass(frozen=True)
class Finding:
    """Something that should not be where it is; `how` it had to be read."""

    place: Place
    haystack: str
    kind: str
    what: str
    length: int
    how: str


def findings(
    haystacks: Iterable[Haystack], *, needles: Iterable[Needle], vectors: Sequence[LabelVector]
) -> list[Finding]:
    """All needles and label vectors in all haystacks: as they lie there, inflated, and (in texts) as decimals."""
    index, labels = Index(needles), LabelIndex(vectors)
    return [
        Finding(hay.place, hay.name, hit.needle.kind, hit.needle.name, hit.length, how)
        for hay in haystacks
        for how, data in _readings(hay)
        for hit in _search(data, index, labels)
    ]


def _search(data: bytes, index: Index, labels: LabelIndex) -> Iterator[Hit]:
    yield from index.search(data)
    yield from labels.search(data)


def _readings(hay: Haystack) -> Iterator[tuple[str, bytes]]:
    yield "as it is", hay.data
    # Whoever deflates without a head leaves nothing to look for; at the beginning of a file it is tried.
    unpacked = inflated(hay.data, raw=hay.place in {"disk", "log"})
    if unpacked:
        yield "inflated", unpacked
    if hay.place in {"disk", "log"}:
        yield "decimals", decimals(hay.data)
