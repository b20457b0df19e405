"""Mixed precision where the processor has units for it: several times as fast, near enough for all measures here."""

from __future__ import annotations

import torch


def fast() -> torch.autocast:
    """A context of bfloat16 arithmetic; nothing changes where there are no such units.

    Weights may change while it lasts, so none are cached.
    """
    units = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=units, cache_enabled=False)
