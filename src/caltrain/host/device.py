"""Where the CenterNet computes: the CPU, or an accelerator that the plan allows and the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.plan import Plan

Choice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Device:
    """A torch device, and whether it computes in mixed precision."""

    name: str
    bf16: bool = False

    @classmethod
    def cpu(cls) -> Device:
        """The CPU in float32: the only place where equal bits are promised."""
        return cls("cpu")

    @classmethod
    def choose(cls, choice: Choice, plan: Plan) -> Device:
        """`auto` takes an accelerator where there is one and the plan allows it.

        Raises ConfigError `device.not-allowed`, `device.none`.
        """
        name = cls.pick(choice, allowed=plan.center.device == "any").name
        return cls(name, bf16=plan.center.precision == "bf16")

    @classmethod
    def pick(cls, choice: Choice, *, allowed: bool) -> Device:
        """In float32; `allowed`: whether the parties, or a package's owner, allow another place than the CPU."""
        present = torch.cuda.is_available()
        if choice == "cuda" and not (allowed and present):
            raise ConfigError(
                "device.none" if allowed else "device.not-allowed",
                "this machine has no CUDA device" if allowed else "the plan keeps the CenterNet on the CPU",
                step="choose device",
                fix="Use --device auto." if allowed else "Agree on [center] device = 'any', without an audit.",
            )
        return cls("cuda" if choice != "cpu" and allowed and present else "cpu")

    def bring(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors to the device, from pinned memory so that copying and computing overlap."""
        if self.name == "cpu":
            return tuple(tensors)
        return tuple(x.pin_memory().to(self.name, non_blocking=True) for x in tensors)

    def take_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Float32 tensors (labels stay as they are) back in the host's memory."""
        if self.name == "cpu":
            return [x.float() for x in tensors]
        pinned = [torch.empty_like(x, device="cpu", dtype=torch.float32, pin_memory=True) for x in tensors]
        for target, x in zip(pinned, tensors, strict=True):
            target.copy_(x, non_blocking=True)
        torch.cuda.synchronize()
        return pinned

    def computing(self) -> AbstractContextManager[object]:
        """The context in which the CenterNet computes."""
        return torch.autocast(self.name, torch.bfloat16) if self.bf16 else nullcontext()
