"""What is done to an intermediate representation before it crosses, as data and as text. Needs no torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from caltrain.errors import ConfigError


class DefenceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Noise, fewer channels, fewer bits. The default does nothing.

    `noise`: standard deviation of Gaussian noise, in standard deviations of the tensor that it is added to.
    `keep`: share of the channels that cross. `bits`: a value's, or None for float32 as it is.
    """

    noise: Annotated[float, msgspec.Meta(ge=0, le=1000)] = 0.0
    keep: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    bits: Annotated[int, msgspec.Meta(ge=1, le=16)] | None = None

    @property
    def text(self) -> str:
        """As `parse_defence` reads it; `none` where nothing is done."""
        parts = [f"noise={self.noise:g}"] if self.noise else []
        parts += [f"keep={self.keep:g}"] if self.keep < 1 else []
        parts += [f"bits={self.bits}"] if self.bits else []
        return ",".join(parts) or "none"


def parse_defence(text: str) -> DefenceSpec:
    """`noise=0.5`, `keep=0.25`, `bits=4`, several with commas, or `none`.

    Raises ConfigError `exposure.unknown-defence`.
    """
    pairs = [part.strip().split("=", 1) for part in text.split(",")] if text != "none" else []
    if all(len(pair) == 2 for pair in pairs) and len({pair[0] for pair in pairs}) == len(pairs):
        try:
            return msgspec.convert(dict(pairs), DefenceSpec, strict=False)
        except msgspec.ValidationError as error:
            raise _unknown(text, f": {error}") from None
    raise _unknown(text, "")


def _unknown(text: str, why: str) -> ConfigError:
    return ConfigError(
        "exposure.unknown-defence",
        f"{text[:60]!r} is no defence{why}",
        step="read defence",
        fix="Write noise=0.5 (standard deviations), keep=0.25 (share of channels), bits=4, or several with commas.",
    )
