"""What fingerprints, distances and neighbours should be, worked out anew: one record at a time, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from caltrain.boundary.sealed import ReleasedPart, open_for
from caltrain.models.network import build
from caltrain.participant.receive import join_weights
from caltrain.plan import Plan
from caltrain.records.commitment import RecordRef
from support.world import World


def released_part(world: World, party: str, *, key: bytes | None = None) -> ReleasedPart:
    """What a party was given; `key` instead of its own data key."""
    own = world.parties[party].data_key
    sealed, context = world.released[party], world.run.vault.run
    return open_for(key or own, "release/v1", sealed, ReleasedPart, context=context, step="open release")


def released_model(world: World, party: str = "alpha") -> nn.Sequential:
    """The model that a party joins from its part and the host's CenterNet, for inference."""
    part = released_part(world, party)
    joined = join_weights(world.plan, part.weights, bytes(world.host.storage["center"]), digest=part.model)
    model = build(world.plan.model, input_shape=world.plan.data.shape)
    model.load_state_dict(safetensors.torch.load(joined))
    return model.eval()


def fingerprint(model: nn.Sequential, plan: Plan, pixels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit-length input of the last layer, and softmax, of one record (1, 4, 4)."""
    values = pixels.to(torch.float32) / (255 if plan.data.dtype == "u8" else 1)
    x = ((values - plan.data.mean[0]) / plan.data.std[0])[None]
    with torch.inference_mode():
        for block in list(model.children())[:-1]:
            x = block(x)
        logits = model[-1](x)[0].numpy().astype(np.float64)
    features = x[0].numpy().astype(np.float64)
    odds = np.exp(logits - logits.max())
    return features / max(float(np.linalg.norm(features)), 1e-12), odds / odds.sum()


@dataclass(frozen=True)
class Known:
    """One record of the run as its contributor knows it."""

    reference: RecordRef
    commitment: bytes
    label: int
    fingerprint: NDArray[np.float64]


def known_records(world: World, model: nn.Sequential) -> list[Known]:
    """Every record, in the manifest's order."""
    pixels, labels = world.data()
    places = [
        (RecordRef(party.name, shard.header.shard, leaf), shard.commitment(leaf))
        for party in world.parties.values()
        for shard in party.shards
        for leaf in range(len(shard.records))
    ]
    return [
        Known(reference, commitment, int(label), fingerprint(model, world.plan, x)[0])
        for (reference, commitment), x, label in zip(places, pixels, labels, strict=True)
    ]
