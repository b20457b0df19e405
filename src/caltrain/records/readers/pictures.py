"""Encoded pictures (JPEG, PNG) to arrays, through Pillow, within bounds."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from caltrain.errors import DataError
from caltrain.records.readers import bounds
from caltrain.records.readers.faults import empty, too_large, wrong_kind, wrong_length

_STEP = "decode image"
_FORMATS = ("JPEG", "PNG")
# How each mode is kept: grey in one channel, everything else in three. Transparency is dropped.
_MODES = {
    "1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB",
}  # fmt: skip
# What Pillow's decoders raise on hostile bytes.
_DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)


def decode_images(blobs: Iterable[tuple[str, bytes]], count: int) -> NDArray[np.uint8]:
    """Decode `count` pictures, each given as (its name for error texts, its encoded bytes).

    Returns (count, C, H, W) with C = 1 for grey and 3 for colour; the first picture sets the shape.
    Raises DataError.
    """
    if not count:
        raise empty("there are no images", step=_STEP)
    images: NDArray[np.uint8] | None = None
    done = 0
    for name, blob in blobs:
        picture = _decode(name, blob)
        if images is None:
            bounds.check_room((count, *picture.shape), itemsize=1, what="images", step=_STEP)
            images = np.empty((count, *picture.shape), dtype=np.uint8)
        if picture.shape != images.shape[1:]:
            raise _mixed(name, picture.shape, images.shape[1:])
        if done == count:
            raise wrong_length(f"more than the announced {count} images", step=_STEP)
        images[done] = picture
        done += 1
    if images is None or done != count:
        raise wrong_length(f"{done} of the announced {count} images", step=_STEP)
    return images


def _decode(name: str, blob: bytes) -> NDArray[np.uint8]:
    if len(blob) > bounds.MAX_ENCODED_BYTES:
        raise too_large(f"{name} has {len(blob)} bytes", step=_STEP)
    try:
        with warnings.catch_warnings():  # Pillow warns of odd but readable files, and of bombs
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(blob), formats=_FORMATS) as image:
                return _pixels(name, image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise too_large(f"{name}: {error}", step=_STEP) from error
    except _DECODER_ERRORS as error:
        raise DataError(
            "reader.undecodable",
            f"{name} is no sound JPEG or PNG: {error}",
            step=_STEP,
            fix="Replace or remove this picture.",
        ) from error


def _pixels(name: str, image: Image.Image) -> NDArray[np.uint8]:
    if max(image.size) > bounds.MAX_SIDE:  # before a pixel is decoded
        raise too_large(f"{name} has {image.width} x {image.height} pixels", step=_STEP)
    mode = _MODES.get(image.mode)
    if mode is None:
        raise wrong_kind(f"{name} has pixels of the mode {image.mode}", step=_STEP)
    pixels = np.asarray(image.convert(mode), dtype=np.uint8)
    return pixels[np.newaxis] if mode == "L" else pixels.transpose(2, 0, 1)


def _mixed(name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> DataError:
    return DataError(
        "reader.mixed-shapes",
        f"{name} has (channels, height, width) {shape}, the first image {first}",
        step=_STEP,
        fix="Bring all images to one size, and all to colour or all to grey.",
    )
