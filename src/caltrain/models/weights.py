"""A model's state as safetensors, and the digest that names it."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from caltrain.crypto.digests import digest
from caltrain.errors import IntegrityError
from caltrain.models.spec import ModelSpec

State = Mapping[str, Tensor]


def state_of(*zones: nn.Module) -> dict[str, Tensor]:
    """Contiguous copies of the state of zones, under the names of the whole model."""
    merged: dict[str, Tensor] = {}
    for zone in zones:
        own = zone.state_dict()
        merged |= {name: value.detach().to("cpu", copy=True).contiguous() for name, value in own.items()}
    return merged


def encode_state(state: State) -> bytes:
    """State as safetensors."""
    return safetensors.torch.save(dict(state))


def decode_state(raw: bytes, *, step: str) -> dict[str, Tensor]:
    """State from untrusted safetensors. Raises IntegrityError `weights.malformed`."""
    try:
        return dict(safetensors.torch.load(raw))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        # One line: torch adds the addresses of its stack, which are no business of the other side.
        raise _misfit(f"not safetensors: {str(error).partition(chr(10))[0][:200]}", step) from None


def check_state(own: Mapping[str, Tensor | None], state: State, *, step: str) -> None:
    """Raise IntegrityError unless names, shapes, types and finiteness all fit."""
    if set(own) != set(state):
        raise _misfit(f"names differ: {sorted(set(own) ^ set(state))[:4]}", step)
    for name, value in state.items():
        mine = own[name]
        if mine is None or value.shape != mine.shape or value.dtype != mine.dtype:
            raise _misfit(f"{name} is {tuple(value.shape)} {value.dtype}", step)
        if not bool(torch.isfinite(value).all()):
            raise _misfit(f"{name} is not finite", step)


def load_zone(zone: nn.Module, state: State, *, step: str) -> None:
    """Copy `state` into a zone. Raises IntegrityError unless it fits (`check_state`); then nothing is copied."""
    own = zone.state_dict()
    check_state(own, state, step=step)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def model_digest(spec: ModelSpec, state: State) -> str:
    """Digest of architecture and all weights, independent of file format: the model's identity."""
    parts = [spec.digest().encode()]
    for name in sorted(state):
        value = state[name].contiguous()
        parts += [name.encode(), str(value.dtype).encode(), str(tuple(value.shape)).encode()]
        parts.append(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest("model/v1", *parts)


def _misfit(what: str, step: str) -> IntegrityError:
    return IntegrityError(
        "weights.malformed",
        f"weights were refused: {what}",
        step=step,
        fix="Get the weights again; they must be those of the model that the plan names.",
    )
