"""Decoding of encoded pictures: modes, bounds, hostile bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from caltrain.errors import DataError
from caltrain.records.readers import bounds
from caltrain.records.readers.pictures import decode_images

COLOUR: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = COLOUR[:, :, 0].copy()


def encode(pixels: NDArray[np.generic], kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def decode(*blobs: bytes) -> NDArray[np.uint8]:
    return decode_images([(f"picture {i}", blob) for i, blob in enumerate(blobs)], len(blobs))


def test_png_is_exact_in_grey_and_colour() -> None:
    assert np.array_equal(decode(encode(COLOUR), encode(COLOUR[::-1]))[1], COLOUR[::-1].transpose(2, 0, 1))
    assert np.array_equal(decode(encode(GREY))[0, 0], GREY)


def test_jpeg_is_decoded() -> None:
    smooth = np.full((16, 16, 3), (10, 100, 200), dtype=np.uint8)
    decoded = decode(encode(smooth, "JPEG"))[0].transpose(1, 2, 0)
    assert np.abs(decoded.astype(int) - smooth).max() <= 3


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3)])
def test_other_modes_become_grey_or_colour(mode: str, channels: int) -> None:
    images = decode(encode(COLOUR, mode=mode))
    assert images.shape == (1, channels, 6, 5)
    if mode == "RGBA":
        assert np.array_equal(images[0], COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("blob", "code"),
    [
        (b"", "reader.undecodable"),
        (b"not a picture", "reader.undecodable"),
        (encode(COLOUR)[:60], "reader.undecodable"),
        (encode(COLOUR, "JPEG")[:-40], "reader.undecodable"),
        (encode(COLOUR, "GIF"), "reader.undecodable"),  # only JPEG and PNG are tried
        (encode(COLOUR, "TIFF"), "reader.undecodable"),
        (png_header(64, 64), "reader.undecodable"),
        (encode(GREY.astype(np.uint16)), "reader.kind"),
        (png_header(4_097, 1), "reader.too-large"),
        (png_header(12_000, 12_000), "reader.too-large"),  # where Pillow warns of a bomb
        (png_header(60_000, 60_000), "reader.too-large"),  # where Pillow raises
    ],
)
def test_pictures_that_are_refused(blob: bytes, code: str) -> None:
    with pytest.raises(DataError, match=rf"^{code}: .*picture 1"):
        decode(encode(COLOUR), blob)


def test_an_encoded_picture_over_the_bound_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ENCODED_BYTES", 50)
    with pytest.raises(DataError, match=r"^reader\.too-large: "):
        decode(encode(COLOUR))


@pytest.mark.parametrize("other", [COLOUR[:5], GREY])
def test_all_pictures_need_one_shape(other: NDArray[np.uint8]) -> None:
    with pytest.raises(DataError, match=r"^reader\.mixed-shapes: picture 1"):
        decode(encode(COLOUR), encode(other))


@pytest.mark.parametrize(
    ("count", "code"),
    [(0, "reader.empty"), (1, "reader.length"), (3, "reader.length"), (2**40, "reader.too-large")],
)
def test_the_announced_count_must_hold(count: int, code: str) -> None:
    blobs = [("a", encode(COLOUR)), ("b", encode(COLOUR))]
    with pytest.raises(DataError, match=rf"^{code}: "):
        decode_images(blobs, count)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sample=st.sampled_from([("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "L")]))
def test_damaged_pictures_give_an_array_or_a_named_error(data: st.DataObject, sample: tuple[str, str]) -> None:
    raw = bytearray(encode(COLOUR, *sample))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(raw)).dtype == np.uint8
    except DataError as error:
        assert error.code.startswith("reader.")  # noqa: PT017  # either outcome is right
