"""All peers by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from caltrain.bench.accountability.attribution import Cosines, Fingerprints, Gradients, Trak
from caltrain.bench.accountability.clusters import Activation, Spectral
from caltrain.bench.accountability.doubters import Confident, Neighbours
from caltrain.bench.accountability.peer import Chance, Peer

PeerMaker = Callable[..., Peer]


def peers() -> dict[str, PeerMaker]:
    """By name, those that can run here: `cleanlab` needs a package of its own."""
    found: dict[str, PeerMaker] = {
        "nearest-fingerprints": Fingerprints,
        "tracin": Gradients,
        "gradient-cosine": Cosines,
        "trak": Trak,
        "activation-clustering": Activation,
        "spectral-signature": Spectral,
        "neighbours": Neighbours,
        "random": Chance,
    }
    return found | ({"cleanlab": Confident} if importlib.util.find_spec("cleanlab") else {})
