"""Pictures as PNG files in memory."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def png(pixels: NDArray[np.generic]) -> bytes:
    """(C, H, W) uint8, one or three channels, as a PNG."""
    array = np.asarray(pixels, np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def data_uri(picture: bytes) -> str:
    """A PNG as the source of an image inside a page."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()
