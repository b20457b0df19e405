"""What a verdict can say, in words: for those who judge, and for those who only read it. Needs no torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["trigger", "mislabelled", "ambiguous", "out-of-distribution", "hard"]
Outcome = Literal["responsible", "cannot-tell"]
