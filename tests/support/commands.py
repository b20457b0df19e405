"""What a command line left on the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command line left on the screen."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output; fails if there is anything else, on standard error too."""
        assert self.err == ""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> dict[str, str]:
        """The error that was printed as JSON."""
        found = self.json
        assert set(found) == {"error"}
        assert set(found["error"]) == {"family", "code", "what", "step", "fix"}
        assert all(isinstance(text, str) and text for text in found["error"].values())
        error: dict[str, str] = found["error"]
        return error


Cli = Callable[..., Outcome]
