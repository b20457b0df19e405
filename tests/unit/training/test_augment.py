"""Scaling, turning and colours, against Darknet's loops written out; and what may be asked of them."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from torch import Tensor

from caltrain.errors import ConfigError
from caltrain.records.schema import DataSchema
from caltrain.training import batches
from caltrain.training.augment import check_augment
from caltrain.training.batches import augment, center_crop, normalise
from caltrain.training.seeds import Draws
from caltrain.training.spec import Augment
from support.samples import refused

DRAWS = Draws(bytes(32), 0, 0)
Size = tuple[int, int]


class Fixed(Draws):
    """Draws whose generators are remembered by name."""

    asked: list[str] = []  # noqa: RUF012 - emptied by each test that reads it

    def generator(self, name: str, layer: int = 0) -> torch.Generator:
        self.asked.append(name)
        return super().generator(name, layer)


def pictures(n: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def between(name: str, n: int) -> list[float]:
    return [2 * x - 1 for x in torch.rand(n, dtype=torch.float64, generator=DRAWS.generator(name)).tolist()]


def factors(name: str, most: float, n: int) -> list[float]:
    size, side = torch.rand((2, n), dtype=torch.float64, generator=DRAWS.generator(name)).tolist()
    return [1 + most * a if b < 0.5 else 1 / (1 + most * a) for a, b in zip(size, side, strict=True)]


# --- scaling, stretching, turning ------------------------------------------------------------------------------


def pixel(record: Tensor, x: int, y: int) -> float:
    inside = 0 <= x < record.shape[1] and 0 <= y < record.shape[0]
    return float(record[y, x]) if inside else 0.0


def bilinear(record: Tensor, x: float, y: float) -> float:
    left, top = math.floor(x), math.floor(y)
    dx, dy = x - left, y - top
    return (
        (1 - dy) * (1 - dx) * pixel(record, left, top)
        + dy * (1 - dx) * pixel(record, left, top + 1)
        + (1 - dy) * dx * pixel(record, left + 1, top)
        + dy * dx * pixel(record, left + 1, top + 1)
    )


def darknet_crop(
    record: Tensor, size: Size, *, side: int, aspect: float, rad: float, go: Size | tuple[float, float]
) -> Tensor:
    """`random_augment_args` and `rotate_crop_image` for one channel, `go` being the place within the possible ones."""
    high, wide = record.shape
    height, width = size
    s = side / min(high, wide * aspect)
    dx, dy = go[0] * (wide * s / aspect - width) / 2, go[1] * (high * s - height) / 2
    out = torch.empty(size)
    for y in range(height):
        for x in range(width):
            u, v = (x - width / 2 + dx) / s * aspect, (y - height / 2 + dy) / s
            rx = math.cos(rad) * u - math.sin(rad) * v + wide / 2
            ry = math.sin(rad) * u + math.cos(rad) * v + high / 2
            out[y, x] = bilinear(record, rx, ry)
    return out


WARPS: dict[str, tuple[Augment, Size | None]] = {
    "scaled": (Augment(min_crop=6, max_crop=12), (6, 6)),
    "scaled to one size": (Augment(min_crop=11, max_crop=11), (5, 7)),
    "turned": (Augment(angle=30), None),
    "stretched": (Augment(aspect=0.75), (6, 6)),
    "all": (Augment(min_crop=6, max_crop=14, angle=180, aspect=1.5), (6, 6)),
}


@pytest.mark.parametrize(("spec", "size"), WARPS.values(), ids=WARPS)
@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (10, 7)])
def test_a_record_is_scaled_stretched_and_turned_as_darknet_does_it(
    spec: Augment, size: Size | None, shape: Size
) -> None:
    n = 5
    given = pictures(n, 2, *shape)
    got = augment(given, spec, DRAWS, size=size)
    sides = [min(shape)] * n
    if spec.max_crop:
        sides = torch.randint(spec.min_crop, spec.max_crop + 1, (n,), generator=DRAWS.generator("scale")).tolist()
    rows = zip(
        sides,
        factors("aspect", spec.aspect, n),
        between("angle", n),
        between("right", n),
        between("down", n),
        strict=True,
    )
    assert got.dtype == torch.float32
    for i, (side, aspect, turn, right, down) in enumerate(rows):
        for channel in range(2):
            rad = turn * math.radians(spec.angle)
            want = darknet_crop(
                given[i, channel].float(), size or shape, side=side, aspect=aspect, rad=rad, go=(right, down)
            )
            assert torch.allclose(got[i, channel], want, atol=0.02), (i, channel)


def test_the_shorter_side_gets_every_size_of_the_range() -> None:
    """A gradient along the picture shows by how much it was scaled."""
    ramp = torch.arange(16.0).expand(1, 16, 16).repeat(400, 1, 1, 1)
    got = augment(ramp, Augment(min_crop=16, max_crop=20), DRAWS, size=(8, 8))
    slopes = (got[:, 0, 4, 5] - got[:, 0, 4, 4]).tolist()
    sides = [round(16 / slope) for slope in slopes]
    counts = [sides.count(side) for side in range(16, 21)]
    assert sum(counts) == 400
    assert min(counts) > 50


@pytest.mark.parametrize("spec", [Augment(), Augment(min_crop=9, max_crop=9)])
def test_records_of_their_own_size_are_cropped_at_whole_pixels(spec: Augment) -> None:
    given = pictures(300, 1, 9, 11)
    got = augment(given, spec, DRAWS, size=(8, 8))
    assert got.dtype == torch.uint8
    found = []
    for record, crop in zip(given, got, strict=True):
        places = [(y, x) for y in range(2) for x in range(4) if torch.equal(record[:, y : y + 8, x : x + 8], crop)]
        assert len(places) == 1
        found += places
    assert min(found.count((y, x)) for y in range(2) for x in range(4)) > 15
    assert torch.equal(got, augment(given, Augment(), DRAWS, size=(8, 8)))


def test_inference_sees_the_middle() -> None:
    given = pictures(2, 3, 9, 12)
    assert torch.equal(center_crop(given, (5, 6)), given[:, :, 2:7, 3:9])
    assert center_crop(given, None) is given


# --- colours ---------------------------------------------------------------------------------------------------


def darknet_colour(rgb: list[float], *, hue: float, saturation: float, exposure: float) -> list[float]:
    """`distort_image` for one pixel in 0..1, through HSV."""
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    out = colorsys.hsv_to_rgb((h + hue) % 1, s * saturation, v * exposure)
    return [min(max(c, 0.0), 1.0) for c in out]


COLOURS = [
    Augment(hue=0.1),
    Augment(hue=1.0),
    Augment(saturation=0.75),
    Augment(exposure=0.75),
    Augment(saturation=10.0, exposure=10.0),
    Augment(hue=0.5, saturation=0.5, exposure=0.5),
]


@pytest.mark.parametrize("spec", COLOURS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_colours_change_as_in_hsv(spec: Augment, dtype: torch.dtype) -> None:
    n = 40
    given = pictures(n, 3, 4, 4)
    given[0], given[1], given[2, 0], given[3, 1] = (
        0,
        255,
        255,
        given[3, 2],
    )  # black, white, full red, two channels alike
    top = 255 if dtype == torch.uint8 else 1
    records = given if dtype == torch.uint8 else given / 255
    got = augment(records, spec, DRAWS)
    assert got.dtype == torch.float32
    assert torch.equal(given, pictures(n, 3, 4, 4).index_copy(0, torch.arange(4), given[:4])), (
        "the records were changed"
    )
    rows = zip(
        between("hue", n), factors("saturation", spec.saturation, n), factors("exposure", spec.exposure, n), strict=True
    )
    for i, (hue, saturation, exposure) in enumerate(rows):
        pixels = (given[i] / 255).flatten(1).T.tolist()
        want = [darknet_colour(p, hue=hue * spec.hue, saturation=saturation, exposure=exposure) for p in pixels]
        assert torch.allclose(got[i].flatten(1).T / top, torch.tensor(want), atol=2e-5), i


def test_colours_stay_in_their_range() -> None:
    got = augment(pictures(200, 3, 8, 8), Augment(hue=1.0, saturation=10.0, exposure=10.0), DRAWS)
    assert float(got.min()) == 0
    assert float(got.max()) == 255


def test_bytes_whose_colours_changed_are_normalised_like_bytes() -> None:
    schema = DataSchema(shape=(3, 8, 8), classes=("a", "b"), mean=(0.4, 0.5, 0.6), std=(0.2,))
    changed = augment(pictures(6, 3, 8, 8), Augment(exposure=0.5), DRAWS)
    want = (changed / 255 - torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)) / 0.2
    assert torch.allclose(normalise(changed, schema, channels_last=True), want, atol=1e-6)


# --- order and draws -------------------------------------------------------------------------------------------

ALL = Augment(shift=1, flip=True, min_crop=8, max_crop=12, angle=20, aspect=0.3, hue=0.2, saturation=0.5, exposure=0.5)


def test_the_order_is_geometry_then_mirror_then_colours() -> None:
    given = pictures(12, 3, 9, 9)
    geometry = Augment(min_crop=8, max_crop=12, angle=20, aspect=0.3)
    colours = Augment(hue=0.2, saturation=0.5, exposure=0.5)
    x = augment(given, geometry, DRAWS, size=(8, 8))
    x = augment(augment(x, Augment(shift=1), DRAWS), Augment(flip=True), DRAWS)
    x = batches._colour(x, colours, DRAWS, top=255.0)
    assert torch.equal(augment(given, ALL, DRAWS, size=(8, 8)), x)


def test_every_draw_has_a_name_of_its_own() -> None:
    Fixed.asked.clear()
    augment(pictures(2, 3, 9, 9), ALL, Fixed(bytes(32), 0, 0), size=(8, 8))
    names = {"aspect", "scale", "angle", "right", "down", "shift", "flip", "hue", "saturation", "exposure"}
    assert set(Fixed.asked) == names
    assert len(Fixed.asked) == len(names)


@pytest.mark.parametrize("records", [7, 61])
def test_the_result_does_not_depend_on_the_number_of_threads(records: int) -> None:
    given = pictures(records, 3, 33, 37)  # 61 of them: more than torch gives to one thread, and no whole vectors
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(augment(given, ALL, DRAWS, size=(31, 29)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# --- what may be asked -----------------------------------------------------------------------------------------

FINE: dict[str, tuple[Augment, tuple[int, ...], Size | None]] = {
    "nothing": (Augment(), (1, 8, 8), None),
    "colours of colours": (Augment(hue=0.1, saturation=0.1, exposure=0.1), (3, 8, 8), None),
    "a range": (Augment(min_crop=6, max_crop=9), (1, 8, 8), (6, 7)),
    "one size": (Augment(min_crop=8, max_crop=8), (1, 8, 9), None),
    "turned grey": (Augment(angle=7, aspect=0.5, flip=True, shift=3), (1, 8, 8), (4, 4)),
}


@pytest.mark.parametrize(("spec", "shape", "size"), FINE.values(), ids=FINE)
def test_what_can_be_done_is_accepted(spec: Augment, shape: tuple[int, ...], size: Size | None) -> None:
    check_augment(spec, shape, size)


NOT_FINE: dict[str, tuple[Augment, tuple[int, ...], Size | None, str]] = {
    "hue of grey": (Augment(hue=0.1), (1, 8, 8), None, "augment.colour"),
    "saturation of grey": (Augment(saturation=0.1), (1, 8, 8), None, "augment.colour"),
    "exposure of four channels": (Augment(exposure=0.1), (4, 8, 8), None, "augment.colour"),
    "from large to small": (Augment(min_crop=9, max_crop=8), (3, 8, 8), (6, 6), "augment.crop"),
    "no lower end": (Augment(max_crop=8), (3, 8, 8), (6, 6), "augment.crop"),
    "no upper end": (Augment(min_crop=8), (3, 8, 8), (6, 6), "augment.crop"),
    "smaller than the crop": (Augment(min_crop=5, max_crop=8), (3, 8, 8), (6, 7), "augment.crop"),
    "smaller than the record, uncropped": (Augment(min_crop=7, max_crop=8), (3, 8, 9), None, "augment.crop"),
}


@pytest.mark.parametrize(("spec", "shape", "size", "code"), NOT_FINE.values(), ids=NOT_FINE)
def test_what_cannot_be_done_is_refused(spec: Augment, shape: tuple[int, ...], size: Size | None, code: str) -> None:
    with refused(ConfigError, code):
        check_augment(spec, shape, size)
