"""What a party measures on its own records before an epoch. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from caltrain.crypto.digests import Digest
from caltrain.exposure.choice import Miss
from caltrain.exposure.figures import Count, Estimate
from caltrain.models.spec import Cut

Figures = Annotated[dict[str, Estimate], msgspec.Meta(max_length=64)]


class PartyReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures by cut and by key (`whitebox.ssim`), and the least FrontNet that meets the policy: 0 for none.

    `misses`: what each assessed cut does not meet. `adversary_records`: how many of the party's own stood for the
    adversary's; the attacked ones are others (DSSE kind `party-report`).
    """

    version: Literal[1] = 1
    model: Digest
    budget: str
    adversary_records: Count
    figures: Annotated[dict[Cut, Figures], msgspec.Meta(max_length=512)]
    misses: Annotated[dict[Cut, tuple[Miss, ...]], msgspec.Meta(max_length=512)]
    front: Cut
