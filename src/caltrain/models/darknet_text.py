"""The text of a Darknet .cfg file as sections of keys and values, every one of them bounded. Needs no torch.

The text is untrusted. Each key is read once, by the name and with the limits that its section knows; what then has not
been read is not supported. All errors are ConfigErrors that name the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from caltrain.errors import ConfigError

MAX_CFG_BYTES = 1 << 18
MAX_SECTIONS = 1024
MAX_KEYS = 64
MAX_LINE = 1000
_SHOWN = 60
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18})([eE][+-]?[0-9]{1,3})?")
_BLANKS = str.maketrans("", "", " \t\r")
T = TypeVar("T")


class Section:
    """`[kind]` at `line`, and its keys."""

    def __init__(self, kind: str, line: int) -> None:
        self.kind, self.line = kind, line
        self._given: dict[str, tuple[int, str]] = {}
        self._read: set[str] = set()

    def add(self, key: str, value: str, line: int) -> None:
        """Take in one line. Raises ConfigError `darknet.malformed`."""
        if key in self._given or len(self._given) == MAX_KEYS:
            raise malformed(line, f"[{self.kind}] has {key[:_SHOWN]!r} twice, or more than {MAX_KEYS} keys")
        self._given[key] = (line, value)

    def has(self, *keys: str) -> bool:
        """Whether any of the keys is given."""
        return any(key in self._given for key in keys)

    def integer(self, key: str, default: int, *, least: int = 0, most: int) -> int:
        """A whole number from `least` to `most`. Raises ConfigError `darknet.malformed`."""
        line, text = self._take(key, str(default))
        if not _INTEGER.fullmatch(text) or not least <= int(text) <= most:
            raise malformed(line, f"{key}={text[:_SHOWN]!r} is no whole number from {least} to {most}")
        return int(text)

    def integers(self, key: str, *, most: int) -> list[int]:
        """One to `most` whole numbers, with commas between them. Raises ConfigError `darknet.malformed`."""
        line, text = self._take(key, "")
        parts = text.split(",")
        if len(parts) > most or not all(_INTEGER.fullmatch(part) for part in parts):
            raise malformed(line, f"{key}={text[:_SHOWN]!r} is no list of 1 to {most} whole numbers")
        return [int(part) for part in parts]

    def number(self, key: str, default: float, *, least: float = 0.0, most: float) -> float:
        """A number from `least` to `most`. Raises ConfigError `darknet.malformed`."""
        line, text = self._take(key, repr(default))
        if not _NUMBER.fullmatch(text) or not least <= float(text) <= most:
            raise malformed(line, f"{key}={text[:_SHOWN]!r} is no number from {least} to {most}")
        return float(text)

    def choice(self, key: str, default: str, choices: Mapping[str, T]) -> T:
        """One of some words. Raises ConfigError `darknet.unsupported`."""
        line, text = self._take(key, default)
        if text not in choices:
            raise unsupported(line, f"[{self.kind}] {key}={text[:_SHOWN]}; supported: {', '.join(choices)}")
        return choices[text]

    def only(self, key: str, value: float) -> None:
        """A key that is supported at this value alone. Raises ConfigError `darknet.unsupported`."""
        line, text = self._take(key, repr(value))
        if not _NUMBER.fullmatch(text) or float(text) != value:
            raise unsupported(line, f"[{self.kind}] {key}={text[:_SHOWN]}; supported: {value:g}")

    def close(self) -> None:
        """Raise ConfigError `darknet.unsupported` for a key that nobody read."""
        for key, (line, _) in self._given.items():
            if key not in self._read:
                raise unsupported(line, f"[{self.kind}] {key[:_SHOWN]}")

    def _take(self, key: str, default: str) -> tuple[int, str]:
        self._read.add(key)
        return self._given.get(key, (self.line, default))


def sections(text: bytes) -> list[Section]:
    """The sections in order. Raises ConfigError `darknet.malformed`."""
    if len(text) > MAX_CFG_BYTES:
        raise malformed(1, f"{len(text)} bytes; the limit is {MAX_CFG_BYTES}")
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError as error:
        raise malformed(1, f"not UTF-8 at byte {error.start}") from None
    found: list[Section] = []
    for number, raw in enumerate(lines, start=1):
        if len(raw) > MAX_LINE:
            raise malformed(number, f"longer than {MAX_LINE} characters")
        line = raw.translate(_BLANKS)  # Darknet drops blanks everywhere, not only at the ends
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            if line[-1] != "]" or len(found) == MAX_SECTIONS:
                raise malformed(number, f"no section, or more than {MAX_SECTIONS}: {line[:_SHOWN]!r}")
            found.append(Section(line[1:-1], number))
            continue
        key, equals, value = line.partition("=")
        if not (found and key and equals):
            raise malformed(number, f"neither a section nor a key of one: {line[:_SHOWN]!r}")
        found[-1].add(key, value, number)
    return found


def malformed(line: int, what: str) -> ConfigError:
    """The error for text that says nothing that a network could be."""
    return ConfigError(
        "darknet.malformed", f"line {line}: {what}", step="read Darknet cfg", fix="Correct that line of the file."
    )


def unsupported(line: int, what: str) -> ConfigError:
    """The error for what Darknet may know and this reader does not."""
    return ConfigError(
        "darknet.unsupported",
        f"line {line}: not supported: {what[:500]}",
        step="read Darknet cfg",
        fix="Change the network, or write the model into the plan layer by layer.",
    )
