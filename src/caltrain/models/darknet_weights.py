"""Darknet's .weights files (untrusted): the weights of the layers in order, as `src/parser.c` of Darknet reads them.

A head of three int32 (major, minor, revision) and a count of the pictures seen (uint64 from version 0.2 on, else
int32). Then float32, layer by layer: of a convolution its biases, with batch normalisation scales, means and
variances, then its weights; of a connected layer biases, then weights. All is little-endian.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from caltrain.errors import ConfigError, IntegrityError
from caltrain.models.layers import AvgPool, Conv, Layer, Linear, Shape, sources_of, weights_of
from caltrain.models.spec import ModelSpec, layer_shapes
from caltrain.models.weights import check_state

_STEP = "read Darknet weights"
_TORCH_EPS, _DARKNET_EPS = 1e-5, 1e-6
_HEAD = 20


def read_weights(source: bytes | Path, spec: ModelSpec, record: Shape) -> dict[str, Tensor]:
    """The state of a network that `read_cfg` gave, for records of shape `record`.

    Raises ConfigError `weights.darknet-file` (a path that cannot be read); IntegrityError `weights.darknet-size`
    (before any weights are read, unless the file shrinks meanwhile), `weights.darknet-order`, `weights.malformed`
    (not finite).
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            start, transposed = _head(file.read(_HEAD))
            counts = _counts(spec, record)
            _check_size(file.seek(0, io.SEEK_END) - start, counts)
            file.seek(start)
            state = dict(_state(file, spec, record, transposed=transposed))
    except OSError as error:
        raise ConfigError(
            "weights.darknet-file",
            f"cannot read {source!s}: {error.strerror or error}",
            step=_STEP,
            fix="Check the path.",
        ) from None
    check_state(state, state, step=_STEP)  # names and shapes are the network's already: this leaves what is not finite
    return state


def _head(raw: bytes) -> tuple[int, bool]:
    """Where the floats begin, and whether weights of connected layers are stored (inputs, outputs)."""
    if len(raw) < 16:
        raise _refused("weights.darknet-size", f"{len(raw)} bytes are no head of a file")
    major, minor = struct.unpack_from("<2i", raw)
    start = _HEAD if major * 10 + minor >= 2 and major < 1000 and minor < 1000 else 16
    return start, major > 1000 or minor > 1000


def _counts(spec: ModelSpec, record: Shape) -> list[int]:
    """Floats of each layer."""
    shapes = layer_shapes(spec, record)
    return [
        weights_of(layer, shapes[sources_of(i, layer)[0] + 1]) + _vectors(layer) * shapes[i + 1][0]
        for i, layer in enumerate(spec.layers)
    ]


def _vectors(layer: Layer) -> int:
    """Values that each filter or unit has beside its weights."""
    if isinstance(layer, Conv):
        return 4 if layer.batch_norm else 1
    return 1 if isinstance(layer, Linear) else 0


def _check_size(size: int, counts: list[int]) -> None:
    expected, found = sum(counts), size / 4
    if found == expected:
        return
    what = f"the file has {found:.10g} floats after its head, the network {expected}"
    if found < expected:
        last = next(i for i in range(len(counts)) if sum(counts[: i + 1]) > found)
        whole = sum(counts[:last]) == found
        what += f": it ends {'before' if whole else 'inside'} layer {last}"
        what += ", as a file of first layers alone does (like darknet53.conv.74)" if whole else ""
    raise _refused("weights.darknet-size", what)


def _state(file: BinaryIO, spec: ModelSpec, record: Shape, *, transposed: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in the order of the file."""
    shapes = layer_shapes(spec, record)
    for i, layer in enumerate(spec.layers):
        inputs = shapes[sources_of(i, layer)[0] + 1]
        if isinstance(layer, Conv):
            if layer.batch_norm:
                yield from _norm(f"{i}.norm.", *(_floats(file, layer.filters) for _ in range(4)))
            else:
                yield f"{i}.conv.bias", _tensor(_floats(file, layer.filters))
            yield f"{i}.conv.weight", _tensor(_floats(file, layer.filters, inputs[0], layer.kernel, layer.kernel))
        elif isinstance(layer, Linear):
            if transposed and any(isinstance(before, AvgPool) for before in spec.layers[:i]):
                # To Darknet a 1x1 convolution of a single pixel is none of the layers that were stored transposed.
                raise _refused(
                    "weights.darknet-order",
                    f"layer {i} may be stored in either order in so old a file",
                    "Load the file with a Darknet of today, and save it again.",
                )
            yield f"{i}.linear.bias", _tensor(_floats(file, layer.units))
            ordered = _floats(file, inputs[0], layer.units).T if transposed else _floats(file, layer.units, inputs[0])
            yield f"{i}.linear.weight", _tensor(ordered)


def _floats(file: BinaryIO, *shape: int) -> NDArray[np.float32]:
    size = 4 * math.prod(shape)
    raw = file.read(size)
    if len(raw) < size:
        raise _refused("weights.darknet-size", f"the last {size - len(raw)} bytes have gone")
    return np.frombuffer(raw, dtype="<f4").reshape(shape)


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32, order="C"))


def _norm(
    prefix: str,
    biases: NDArray[np.float32],
    scales: NDArray[np.float32],
    mean: NDArray[np.float32],
    var: NDArray[np.float32],
) -> Iterator[tuple[str, Tensor]]:
    """Darknet divides by sqrt(variance) + 1e-6, torch by sqrt(variance + 1e-5): stored so that results agree.

    Where no variance gives the divisor, since it would be below 0, it is 0 and the scale takes up the rest.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a negative or infinite variance is refused with the state
        divisor = np.sqrt(var.astype(np.float64)) + _DARKNET_EPS
        variance = np.maximum(divisor**2 - _TORCH_EPS, 0)
        rest = np.sqrt(variance + _TORCH_EPS) / divisor
        yield f"{prefix}weight", _tensor(scales * rest)
    yield f"{prefix}bias", _tensor(biases)
    yield f"{prefix}running_mean", _tensor(mean)
    yield f"{prefix}running_var", _tensor(variance)
    yield f"{prefix}num_batches_tracked", torch.tensor(0)


def _refused(code: str, what: str, fix: str = "Give the whole .weights file of this very cfg.") -> IntegrityError:
    return IntegrityError(code, f"the weights were refused: {what}", step=_STEP, fix=fix)
