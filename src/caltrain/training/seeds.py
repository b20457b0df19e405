"""Every draw of a training run from a key, never from a running stream (DESIGN: the protocol, 5).

run seed = HKDF(enclave randomness, every party's entropy). Each purpose has a sub-seed; the CenterNet's is given to
the host, and from it nothing else follows. A draw is keyed by (sub-seed, name, epoch, step, layer), so it does not
matter in which process, or after which other draw, it is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from caltrain.crypto.kdf import derive

SEED_BYTES = 32


def run_seed(enclave_randomness: bytes, entropies: Sequence[bytes]) -> bytes:
    """Combine 32 bytes of the enclave with 32 of each party, in the plan's order: one honest part is enough."""
    return derive(b"".join((enclave_randomness, *entropies)), "run-seed/v1")


@dataclass(frozen=True)
class RunSeeds:
    """Sub-seeds of one run, 32 bytes each."""

    front: bytes
    center: bytes
    head: bytes
    order: bytes
    augment: bytes

    @classmethod
    def from_run_seed(cls, seed: bytes) -> RunSeeds:
        """Derive all sub-seeds."""
        names = ("front", "center", "head", "order", "augment")
        return cls(**{name: derive(seed, f"sub-seed/{name}/v1") for name in names})


@dataclass(frozen=True)
class Draws:
    """The key of the draws of one step in one zone."""

    seed: bytes
    epoch: int
    step: int

    def generator(self, name: str, layer: int = 0) -> torch.Generator:
        """A fresh generator for one named draw of this step."""
        return _generator(self.seed, name, self.epoch, self.step, layer)


def _generator(seed: bytes, name: str, *position: int) -> torch.Generator:
    raw = derive(seed, f"draw/{name}/v1", *(p.to_bytes(8, "big") for p in position), length=8)
    # 63 bits: torch takes a signed 64-bit seed.
    return torch.Generator().manual_seed(int.from_bytes(raw, "big") >> 1)


def epoch_order(records: int, *, seed: bytes, epoch: int) -> Tensor:
    """Permutation (records,) of the pool at the start of an epoch, relative to the epoch before."""
    return torch.randperm(records, generator=_generator(seed, "order", epoch))


def initialise(zone: nn.Sequential, seed: bytes) -> None:
    """Draw the zone's first weights: He initialisation (arXiv:1502.01852), biases 0, keyed by layer."""
    for name, block in zone.named_children():
        generator = _generator(seed, "init", int(name))
        for module in block.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = math.prod(module.weight.shape[1:])
                with torch.no_grad():
                    module.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()
