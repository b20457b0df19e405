"""Fingerprints of one class in 16 bits a number, split into three planes: the first 4 bits, the next 8, the last 4.

A scan reads the first plane alone, a quarter of the bytes; the three together give back what was stored, bit for bit.
Numbers are whole multiples of 2**-14, kept as differences from the rows' centre; the first plane counts them in steps
of an eighth of the row's largest, the second what is left in 256ths of a step, the third the rest. So the first plane
tells as much where rows are close together, as those of one class are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor

from caltrain.errors import DataError

GRID = 2.0**-14
"""Stored numbers are multiples of it: all that float16 can tell apart from 1/16 up."""
MAX_DIMS = 1 << 14
_ALIGN = 64  # rows of a block of the packed plane
_DIMS = 32  # the kernel takes multiples of this
_CHUNK = 1 << 12  # rows that are worked on at once: what they take stays in the cache
_LEAST = 1.0001  # a bound worked out in float32 is rounded up by this


def stored(fingerprints: Tensor) -> Tensor:
    """What is stored of fingerprints (N, D), rows of length one: float16, multiples of 2**-14.

    Raises DataError `fingerprint.not-unit` for numbers that are not in -1..1, or more dimensions than 2**14.
    """
    if fingerprints.ndim != 2 or not 1 <= fingerprints.shape[1] <= MAX_DIMS:
        raise _refuse(f"fingerprints of the shape {tuple(fingerprints.shape)}")
    if not bool((fingerprints.abs() <= 1.001).all()):  # NaN is not
        raise _refuse("fingerprints hold a number that is not in -1..1")
    whole = (fingerprints.half().float().clamp(-1, 1) / GRID).round() + 0.0  # one zero, not two
    return whole.mul(GRID).half()


@dataclass(frozen=True)
class Planes:
    """Rows of `dims` numbers: row i is `center + (high - 8) * step[i] + (middle + 128) * fine_steps(step[i]) + low`.

    All in units of 2**-14. `high` is packed for the kernel, in blocks of 64 rows; `middle` is (N, K) and `low`, two
    numbers a byte, (N, K/2), K being `dims` rounded up. `energy` is each row's squared distance from the centre,
    `spread` the length of what the first plane does not tell of it, `reach` the longest of what it does tell.
    """

    dims: int
    center: Tensor
    high: Tensor
    middle: Tensor
    low: Tensor
    step: Tensor
    energy: Tensor
    spread: Tensor
    reach: float

    def __len__(self) -> int:
        return len(self.step)

    @property
    def width(self) -> int:
        """Dimensions with padding."""
        return self.middle.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        held = (getattr(self, field.name) for field in fields(self))
        return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))

    @classmethod
    def of(cls, rows: Tensor) -> Planes:
        """Split rows (N, D) in float16 as `stored` makes them. Raises DataError `fingerprint.not-stored`."""
        splitting = Splitting(len(rows), rows.shape[1])
        splitting.add(rows)
        return splitting.done()

    def exact(self, index: Tensor) -> Tensor:
        """Rows `index` in float64 (M, D), just as they were stored."""
        steps, pairs = self.step[index].double()[:, None], self.low.index_select(0, index)
        low = torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)
        away = (
            (self._first(index) - 8) * steps
            + (self.middle.index_select(0, index).double() + 128) * fine_steps(steps)
            + low
        )
        return (away[:, : self.dims] + self.center) * GRID

    def _first(self, index: Tensor) -> Tensor:
        """The first plane (M, K) of rows `index`, 0..15."""
        block, row = index // _ALIGN, index % _ALIGN
        place = _places(self.width)[row] + (block * (_ALIGN * self.width))[:, None]
        return (self.high.view(-1)[place >> 1].to(torch.int32) >> ((place & 1) * 4).to(torch.int32)) & 15

    def rows(self) -> Tensor:
        """All rows in float16 (N, D), just as they were stored."""
        parts = [self.exact(part).half() for part in torch.split(torch.arange(len(self)), _CHUNK)]
        return torch.cat(parts) if parts else torch.empty((0, self.dims), dtype=torch.float16)

    def without(self, gone: Tensor) -> Planes:
        """The rows where `gone` (N,) is false."""
        keep = (~gone).nonzero().squeeze(1)
        chunks = [_pack(self._first(part)) for part in torch.split(keep, _CHUNK) if len(part)]
        return replace(
            self,
            high=torch.cat(chunks) if chunks else self.high[:0],
            middle=self.middle[keep],
            low=self.low[keep],
            step=self.step[keep],
            energy=self.energy[keep],
            spread=self.spread[keep],
        )


class Splitting:
    """Planes in the making: rows are added in any portions, and no more memory is taken than the planes do."""

    def __init__(self, capacity: int, dims: int) -> None:
        """For at most `capacity` rows."""
        width = -(-dims // _DIMS) * _DIMS
        self._dims, self._width, self._filled = dims, width, 0
        self._center: Tensor | None = None
        self._waiting = torch.empty((0, dims), dtype=torch.float16)
        self._high = torch.empty((_blocks(capacity) * _ALIGN, width // 2), dtype=torch.uint8)
        self._middle = torch.empty((capacity, width), dtype=torch.int8)
        self._low = torch.empty((capacity, width // 2), dtype=torch.uint8)
        self._step, self._energy, self._spread = (torch.empty(capacity) for _ in range(3))

    def add(self, rows: Tensor) -> None:
        """More rows (n, D) in float16; the first portion decides the centre.

        Raises DataError `fingerprint.not-stored`.
        """
        if self._center is None and len(rows):
            mean = rows.mean(0, dtype=torch.float32) / GRID
            # Kept off the edges, so that no difference takes more than 16 bits; what is no number is refused below.
            self._center = mean.round().nan_to_num().clamp(-0.5 / GRID, 0.5 / GRID)
        rows = torch.cat((self._waiting, rows)) if len(self._waiting) else rows
        whole = len(rows) // _CHUNK * _CHUNK
        for start in range(0, whole, _CHUNK):
            self._put(rows[start : start + _CHUNK])
        self._waiting = rows[whole:].clone()

    def done(self) -> Planes:
        """The planes of all rows that were added."""
        if len(self._waiting):
            self._put(self._waiting)
        center = torch.zeros(self._dims) if self._center is None else self._center
        n = self._filled
        energy, spread = self._energy[:n], self._spread[:n]
        reach = float((energy.sqrt() + spread).max()) * _LEAST if n else 0.0
        high = self._high[: _blocks(n) * _ALIGN]
        return Planes(self._dims, center, high, self._middle[:n], self._low[:n], self._step[:n], energy, spread, reach)

    def _put(self, rows: Tensor) -> None:
        here = slice(self._filled, self._filled + len(rows))
        center = torch.zeros(self._dims) if self._center is None else self._center
        away = _away(rows, center, self._width)
        # Whole numbers below 2**15: their quotients in float32, rounded down, are exact.
        steps = (away.abs().amax(1) / 8).floor() + 1
        first = (away / steps[:, None]).floor()
        rest = away.addcmul(first, steps[:, None], value=-1)
        self._high[here.start : here.start + _blocks(len(rows)) * _ALIGN] = _pack((first + 8).to(torch.int32))
        self._middle[here], self._low[here] = _lower(rest, fine_steps(steps)[:, None])
        self._step[here] = steps
        self._energy[here] = away.double().square().sum(1) * GRID**2
        left = (rest - 0.5 * steps[:, None])[:, : self._dims]
        self._spread[here] = left.norm(dim=1) * (GRID * _LEAST)
        self._filled = here.stop


def fine_steps(steps: Tensor) -> Tensor:
    """How much one of the second plane's 256 counts, for steps of the first plane: 1 to 16."""
    return ((steps + 255) / 256).floor()


def _away(rows: Tensor, center: Tensor, width: int) -> Tensor:
    """Differences from the centre (n, K): whole numbers, in units of 2**-14."""
    scaled = rows.float() / GRID
    whole = scaled.round()
    if not bool(((scaled == whole) & (whole.abs() <= 1 / GRID)).all()):
        raise DataError(
            "fingerprint.not-stored",
            "fingerprints are not multiples of 2**-14 in -1..1",
            step="index fingerprints",
            fix="Give what `stored` makes of them.",
        )
    return torch.nn.functional.pad(whole - center, (0, width - rows.shape[1]))


def _lower(rest: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    middle = (rest / fine).floor()
    nibbles = rest.addcmul(middle, fine, value=-1)
    return (middle - 128).to(torch.int8), (nibbles[:, 0::2] + 16 * nibbles[:, 1::2]).to(torch.uint8)


def _blocks(rows: int) -> int:
    return -(-rows // _ALIGN)


def _pack(high: Tensor) -> Tensor:
    """Numbers 0..15 (n, K) as the kernel wants them: whole blocks of rows, padded."""
    missing = _blocks(len(high)) * _ALIGN - len(high)
    return torch._convert_weight_to_int4pack_for_cpu(torch.nn.functional.pad(high, (0, 0, 0, missing)), 2)


@cache
def _places(width: int) -> Tensor:
    """Where the kernel's own order puts each number of a block: nibbles (64, K), found by packing numbers we know."""
    count = _ALIGN * width
    number, known = torch.arange(count).reshape(_ALIGN, width), torch.zeros(count, dtype=torch.int64)
    for shift in range(0, count.bit_length(), 4):
        packed = _pack(((number >> shift) & 15).to(torch.int32)).flatten().to(torch.int64)
        known += torch.stack((packed & 15, packed >> 4), dim=1).flatten() << shift
    places = torch.empty_like(known)
    places[known] = torch.arange(count)
    return places.reshape(_ALIGN, width)


def _refuse(what: str) -> DataError:
    return DataError(
        "fingerprint.not-unit", what, step="store fingerprints", fix="Give rows of length one, at most 2**14 numbers."
    )
