"""The searches of the canary test find every form of a needle, wherever it lies, and nothing in noise."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support import canary_needles as n
from support.canary_findings import findings
from support.canary_host import Haystack, Place
from support.canary_search import Index, LabelIndex, LabelVector, Needle, decimals, inflated

SECRET = np.random.default_rng(1).integers(0, 256, 200, dtype=np.uint8).tobytes()
OTHER = np.random.default_rng(2).integers(0, 256, 200, dtype=np.uint8).tobytes()
NOISE = np.random.default_rng(3).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
PICTURE = torch.from_numpy(np.random.default_rng(4).integers(0, 256, (3, 5, 6), dtype=np.uint8))
LABELS = np.random.default_rng(5).integers(0, 10, 24)
INDEX = Index([Needle("record", "secret", SECRET), Needle("record", "other", OTHER)], table_bits=20)
VECTOR = LabelVector("batch", LABELS, 10)


def buried(data: bytes, offset: int = 1001) -> bytes:
    """`data` in the middle of noise."""
    return NOISE[:offset] + data + NOISE[offset : offset + 5000]


def names(index: Index | LabelIndex, data: bytes) -> list[str]:
    """What is found."""
    return [hit.needle.name for hit in index.search(data)]


# --- stretches of bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [*range(9), 5000])
def test_a_needle_is_found_at_every_offset(offset: int) -> None:
    (hit,) = INDEX.search(buried(SECRET, offset))
    assert (hit.needle.name, hit.start, hit.offset, hit.length) == ("secret", 0, offset, 200)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 177), st.integers(0, 64), st.integers(23, 200))
def test_every_long_stretch_of_a_needle_is_found(start: int, offset: int, length: int) -> None:
    part = SECRET[start : start + length]
    (hit,) = INDEX.search(bytes(offset) + part + bytes(40))
    assert hit.length >= len(part)
    assert hit.offset <= offset


def test_a_stretch_counts_from_its_least_length_on() -> None:
    assert names(INDEX, bytes(8) + SECRET[40:56] + bytes(8)) == ["secret"]
    assert names(INDEX, bytes(8) + SECRET[40:55] + bytes(8)) == []


def test_a_needle_is_found_where_the_haystack_ends_and_where_it_is_nothing_else() -> None:
    assert names(INDEX, bytes(100) + SECRET) == names(INDEX, SECRET) == ["secret"]
    assert names(INDEX, bytes(16) + SECRET[:24]) == ["secret"]


def test_every_needle_is_found_once_where_it_first_lies() -> None:
    hits = INDEX.search(SECRET + OTHER + SECRET)
    assert [(hit.needle.name, hit.offset) for hit in hits] == [("secret", 0), ("other", 200)]


def test_needles_that_share_bytes_are_all_found() -> None:
    index = Index([Needle("record", "long", SECRET), Needle("record", "part", SECRET[20:60])], table_bits=20)
    assert sorted(names(index, buried(SECRET[16:64]))) == ["long", "part"]


def test_a_stretch_does_not_run_on_from_one_needle_into_the_next() -> None:
    assert names(INDEX, bytes(8) + SECRET[-12:] + OTHER[:12] + bytes(8)) == []


def test_what_is_monotonous_is_not_found() -> None:
    index = Index([Needle("record", "zeros", bytes(100)), Needle("record", "ones", b"\0\0\x80\x3f" * 30)])
    assert names(index, bytes(1000) + b"\0\0\x80\x3f" * 200) == []
    border = b"\0\0\x80\xbf" * 10  # -1.0, what normalisation makes of the zeros round a shifted picture
    index = Index([Needle("record", "shifted", border + SECRET)], table_bits=20)
    assert names(index, bytes(4) + border + SECRET[:4] + bytes(40)) == []
    assert names(index, bytes(4) + border + SECRET[:12] + bytes(40)) == ["shifted"]


def test_nothing_is_found_in_noise_nor_in_nothing_nor_of_nothing() -> None:
    assert names(INDEX, NOISE) == names(INDEX, b"") == names(INDEX, b"short") == []
    assert names(Index([]), buried(SECRET)) == names(LabelIndex([]), buried(SECRET)) == []


# --- forms of a record ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_a_picture_is_found_in_every_float_type_and_layout(dtype: torch.dtype, order: tuple[int, ...]) -> None:
    x = PICTURE / 255
    data = n.raw_bytes(x.to(dtype).permute(order).flatten())
    assert names(Index(n.float_needles("record", "picture", x)), buried(data[20:120]))


def test_a_layout_of_a_whole_batch_and_of_a_weight_is_that_of_its_parts() -> None:
    batch = torch.stack([PICTURE, PICTURE.flip(0)]) / 255
    stored = batch.contiguous(memory_format=torch.channels_last)
    data = n.raw_bytes(stored.as_strided((stored.numel(),), (1,)))
    assert names(Index(n.float_needles("record", "picture", batch[0])), buried(data))
    assert names(Index(n.float_needles("weights", "weight", batch)), buried(data))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_a_picture_is_found_as_bytes_in_both_layouts(order: tuple[int, ...]) -> None:
    data = n.raw_bytes(PICTURE.permute(order).flatten())
    assert names(Index(n.byte_needles("record", "picture", PICTURE)), buried(data))


@pytest.mark.parametrize("before", range(4))
def test_base64_is_found_in_every_alignment(before: int) -> None:
    text = base64.b64encode(NOISE[:before] + SECRET + NOISE[:50])
    assert any("base64" in name for name in names(Index(n.wrapped(Needle("record", "r", SECRET))), buried(text)))


@pytest.mark.parametrize("spell", [bytes.hex, lambda data: data.hex().upper()])
def test_hex_is_found_in_both_cases(spell: Callable[[bytes], str]) -> None:
    text = spell(SECRET[50:100]).encode()
    assert any("hex" in name for name in names(Index(n.wrapped(Needle("record", "r", SECRET))), buried(text)))


@pytest.mark.parametrize("level", [1, 6, 9])
def test_a_deflated_record_is_found_without_inflating(level: int) -> None:
    # Few values, so that the levels choose different matches and give different streams.
    data = (np.random.default_rng(7).integers(0, 8, 768) / 8).astype("<f4").tobytes()
    stream = zlib.compressobj(level, wbits=-15)
    packed = stream.compress(data) + stream.flush()
    assert any("deflated" in name for name in names(Index(n.wrapped(Needle("record", "r", data))), buried(packed)))


# --- packed and printed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [zlib.compress, lambda data: zlib.compress(data, 1), gzip.compress])
@pytest.mark.parametrize("offset", [0, 1, 4097])
def test_streams_are_inflated_wherever_they_begin(pack: Callable[[bytes], bytes], offset: int) -> None:
    assert names(INDEX, inflated(buried(pack(bytes(300) + SECRET), offset))) == ["secret"]


def test_a_stream_that_breaks_off_is_inflated_up_to_there() -> None:
    packed = zlib.compress(n.raw_bytes((PICTURE / 255).flatten()) + OTHER * 20)
    needles = n.float_needles("record", "picture", PICTURE / 255)
    assert names(Index(needles), inflated(packed[: len(packed) - 20]))
    assert names(INDEX, inflated(zlib.compress(NOISE[:5000] + SECRET + NOISE[:5000])[:5600] + NOISE)) == ["secret"]


def test_a_bomb_gives_a_mebibyte_and_little_more() -> None:
    assert (1 << 20) <= len(inflated(zlib.compress(bytes(64 << 20), 9))) < 2 << 20


def test_a_headless_stream_is_inflated_from_the_beginning_on_demand() -> None:
    packed = zlib.compress(bytes(300) + SECRET)[2:-4]
    assert names(INDEX, inflated(packed, raw=True)) == ["secret"]
    assert b"".join(inflated(NOISE).split(SECRET)) == inflated(NOISE)
    assert names(INDEX, inflated(NOISE, raw=True)) == []


@pytest.mark.parametrize(
    "spell",
    [
        lambda p: str(p.tolist()),
        lambda p: json.dumps(p.tolist(), indent=1),
        lambda p: str(p.numpy()),
        str,
        lambda p: " ".join(str(int(v)) for v in p.flatten()),
    ],
    ids=["list", "json", "numpy", "torch", "words"],
)
def test_printed_pictures_are_found(spell: Callable[[torch.Tensor], str]) -> None:
    index = Index(n.byte_needles("record", "picture", PICTURE))
    assert names(index, decimals(b"12:30:01.123 debug " + spell(PICTURE).encode())) == ["picture u8 channels first"]
    assert names(index, decimals(NOISE)) == []


@pytest.mark.parametrize(
    ("place", "data", "how"),
    [
        ("memory", SECRET, "as it is"),
        ("door", zlib.compress(bytes(300) + SECRET), "inflated"),
        ("disk", zlib.compress(bytes(300) + SECRET)[2:-4], "inflated"),
        ("log", str(list(SECRET)).encode(), "decimals"),
    ],
)
def test_findings_say_where_and_how(place: Place, data: bytes, how: str) -> None:
    hay = Haystack(place, "a place", buried(data) if place in {"memory", "door"} else data)
    (found,) = findings([hay], needles=[Needle("record", "secret", SECRET)], vectors=[])
    assert (found.place, found.haystack, found.what, found.how) == (place, "a place", "secret", how)
    assert findings([Haystack(place, "noise", NOISE)], needles=[Needle("record", "secret", SECRET)], vectors=[]) == []


def test_findings_include_labels() -> None:
    hay = Haystack("door", "out", buried(LABELS.astype("<i8").tobytes()))
    (found,) = findings([hay], needles=[], vectors=[VECTOR])
    assert (found.kind, found.what) == ("labels", "batch as <i8")


# --- labels ---------------------------------------------------------------------------------------------------------


def one_hot(labels: NDArray[np.int64]) -> bytes:
    """Float rows with one 1 each."""
    return np.eye(10, dtype="<f4")[labels].tobytes()


FORMS: dict[str, Callable[[NDArray[np.int64]], bytes]] = {
    "|u1": lambda labels: labels.astype("u1").tobytes(),
    "<i2": lambda labels: labels.astype("<i2").tobytes(),
    "<i4": lambda labels: labels.astype("<i4").tobytes(),
    "<i8": lambda labels: labels.astype("<i8").tobytes(),
    "<f4": lambda labels: labels.astype("<f4").tobytes(),
    "one-hot f4": one_hot,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 1005, 1006, 1007])
def test_labels_are_found_in_every_form_and_at_every_offset(form: str, offset: int) -> None:
    (hit,) = LabelIndex([VECTOR]).search(buried(FORMS[form](LABELS), offset))
    assert hit.needle.name == f"batch as {form}"
    assert offset - 4 * 10 < hit.offset <= offset
    assert hit.length >= len(FORMS[form](LABELS))


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_the_labels_is_found_if_it_is_long_enough(form: str) -> None:
    index = LabelIndex([VECTOR])
    assert names(index, buried(FORMS[form](LABELS[4:21])))
    assert not names(index, buried(FORMS[form](LABELS[4:16])))


def test_labels_are_not_found_where_other_bytes_lie_between() -> None:
    values = LABELS.astype("<i8") + (7 << 40)
    assert not names(LabelIndex([VECTOR]), buried(values.tobytes()))


def test_labels_are_not_found_in_noise_in_zeros_nor_in_other_labels() -> None:
    index, others = LabelIndex([VECTOR]), np.random.default_rng(6).integers(0, 10, 5000)
    for data in (NOISE, bytes(1 << 16), np.ones(4096, "<f4").tobytes(), *(spell(others) for spell in FORMS.values())):
        assert not names(index, data)
