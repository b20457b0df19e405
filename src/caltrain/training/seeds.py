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

_WORDS, _WORDS_AT = 624, 24  # the generator's state: 24 bytes of counters, then 624 words of 32 bits in 8 bytes each


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
    # `manual_seed` keeps 32 bits of its seed, so few that a host could try them all on the FrontNet's first weights.
    # The key therefore fills the whole state of torch's generator (Mersenne Twister).
    raw = derive(seed, f"draw/{name}/v1", *(p.to_bytes(8, "big") for p in position), length=4 * _WORDS)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    words = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(torch.int64)
    words.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint32))
    return generator.set_state(state)


def epoch_order(records: int, *, seed: bytes, epoch: int) -> Tensor:
    """Permutation (records,) of the pool at the start of an epoch, relative to the epoch before."""
    return torch.randperm(records, generator=_generator(seed, "order", epoch))


def initialise(zone: nn.Module, seed: bytes) -> None:
    """Draw the zone's first weights as PyTorch does, uniform in +-1/sqrt(fan-in), but keyed by layer.

    Parameters of one dimension outside convolutions and linear layers (normalisations) keep their constant.
    """
    for name, block in zone.named_children():
        generator = _generator(seed, "init", int(name))
        for module in block.modules():
            weight = getattr(module, "weight", None)
            mixes = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            for parameter in module.parameters(recurse=False):
                if mixes or parameter.dim() > 1:
                    fan_in = math.prod((weight if mixes and isinstance(weight, Tensor) else parameter).shape[1:])
                    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
