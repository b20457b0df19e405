"""What an adversary knows of pictures before it sees anything of them: learned from its own.

*Pictures* (N, C, H, W) lie in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_MOST_COMPONENTS = 3072
_LEAST_SCALE = 1e-3


class Basis(Protocol):
    """Directions in which pictures vary, each scaled by how much: coordinates of pictures are about N(0, 1) in it."""

    @property
    def mean(self) -> Tensor:
        """The mean picture, (1, C, H, W)."""
        ...

    def offset(self, z: Tensor) -> Tensor:
        """What coordinates `z` (N, C, H, W) add to a picture: the same shape. Linear, of full rank."""
        ...


def basis_of(own: Tensor) -> Basis:
    """The principal components of `own` pictures, all of them; of more than 3,072 values, the cosines.

    For natural pictures the discrete cosine transform comes close to the principal components (Ahmed et al. 1974).
    """
    return Components.of(own) if own[0].numel() <= _MOST_COMPONENTS else Cosines.of(own)


@dataclass(frozen=True)
class Components:
    """Principal components: `matrix` (D, D) takes coordinates to offsets, D = C*H*W."""

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, own: Tensor) -> Components:
        """Of pictures; those directions in which none varies get a standard deviation of 0.001."""
        mean = own.mean(0, keepdim=True)
        centred = (own - mean).flatten(1)
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(own))
        return cls(mean, directions.T * variance.clamp_min(0).sqrt().clamp_min(_LEAST_SCALE)[:, None])

    def offset(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.matrix).view_as(z)


@dataclass(frozen=True)
class Cosines:
    """Cosines down and across, of decorrelated colours; `scale` (1, C, H, W): how much each varies."""

    mean: Tensor
    scale: Tensor
    colours: Tensor

    @classmethod
    def of(cls, own: Tensor) -> Cosines:
        """Of pictures; frequencies in which none varies get a standard deviation of 0.001."""
        mean = own.mean(0, keepdim=True)
        centred = own - mean
        colours = torch.linalg.eigh(torch.einsum("nchw,ndhw->cd", centred, centred))[1]
        spectrum = _down(own) @ torch.einsum("nchw,cd->ndhw", centred, colours) @ _across(own).T
        return cls(mean, spectrum.square().mean(0, keepdim=True).sqrt().clamp_min(_LEAST_SCALE), colours)

    def offset(self, z: Tensor) -> Tensor:
        planes = _down(z).T @ (z * self.scale) @ _across(z)
        return torch.einsum("ndhw,cd->nchw", planes, self.colours)


def _down(pictures: Tensor) -> Tensor:
    return _cosines(pictures.shape[2])


def _across(pictures: Tensor) -> Tensor:
    return _cosines(pictures.shape[3])


def _cosines(side: int) -> Tensor:
    """The orthonormal cosine transform (side, side): row k has frequency k."""
    places = torch.arange(side, dtype=torch.float64)
    rows = torch.cos(math.pi / side * places[:, None] * (places + 0.5)) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows.float()


def roughness(pictures: Tensor) -> Tensor:
    """Total variation (N,), over channels, per value: the length of each place's step down and across.

    As in arXiv:1412.0035 with beta 1 (and in He et al., ACSAC 2019), smoothed where a step is under 0.001.
    """
    corner = pictures[:, :, :-1, :-1]
    down, across = pictures[:, :, 1:, :-1] - corner, pictures[:, :, :-1, 1:] - corner
    return (down.square() + across.square() + 1e-6).sqrt().flatten(1).sum(1) / pictures[0].numel()
