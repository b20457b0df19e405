"""Darknet cfg files: what each section becomes, the published networks, and text that means harm."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caltrain.errors import ConfigError
from caltrain.models import darknet_text
from caltrain.models.darknet import DarknetModel, read_cfg
from caltrain.models.layers import AvgPool, Conv, Dropout, Flatten, Layer, Linear, MaxPool, Route, Shortcut
from caltrain.models.network import build
from caltrain.models.spec import ModelSpec, Partition, check_model, layer_shapes, macs
from caltrain.models.weights import state_of
from caltrain.training.spec import Augment, TrainingSpec
from support.networks import cfg, cfg_text
from support.samples import quick, refused

NET = "[net]\nheight=8\nwidth=6\nchannels=3\n"
CONV = "[convolutional]\nfilters=4\nsize=3\npad=1\nactivation=relu\n"
CV, LEAKY = "[convolutional]\n", "activation=leaky\n"
END = "[connected]\noutput=5\nactivation=linear\n[softmax]\n"


def read(*sections: str, net: str = NET) -> DarknetModel:
    return read_cfg("".join((net, *sections)).encode())


def layers(*sections: str) -> tuple[Layer, ...]:
    """Of a network that goes on as `END`."""
    return read(*sections, END).model.layers


# --- the published files ----------------------------------------------------------------------------------------

READ = {
    "alexnet": (14, (3, 227, 227), 1000),
    "cifar": (16, (3, 32, 32), 10),
    "cifar.2016": (16, (3, 32, 32), 10),
    "cifar.2017": (16, (3, 32, 32), 10),
    "cifar_small": (10, (3, 32, 32), 10),
    "darknet": (15, (3, 256, 256), 1000),
    "darknet19": (25, (3, 256, 256), 1000),
    "darknet53": (77, (3, 256, 256), 1000),
    "densenet201": (304, (3, 256, 256), 1000),
    "extraction": (26, (3, 224, 224), 1000),
    "tiny": (21, (3, 224, 224), 1000),
    "vgg-16": (24, (3, 256, 256), 1000),
}
REFUSED = {
    "cifar.test": "line 116: not supported: [softmax] temperature=3",
    "resnet18": "[shortcut]: layer 10 (shortcut) cannot join (128, 32, 32), (64, 64, 64)",
    "resnet50": "[shortcut]: layer 5 (shortcut) cannot join (256, 64, 64), (64, 64, 64)",
}


@pytest.mark.data
@pytest.mark.parametrize("name", READ)
def test_a_published_network_reads_and_can_be_cut(name: str) -> None:
    found = cfg(name)
    assert (len(found.model.layers), found.record, found.classes) == READ[name]
    cut = Partition(front=4, head=2)
    check_model(found.model, cut, input_shape=found.record, classes=found.classes)
    training = found.training(epochs=3)
    assert msgspec.convert(msgspec.to_builtins(found.model), ModelSpec) == found.model
    assert msgspec.convert(msgspec.to_builtins(training), TrainingSpec) == training


@pytest.mark.data
@pytest.mark.parametrize("name", REFUSED)
def test_a_published_network_that_cannot_be_had_is_refused_with_the_reason(name: str) -> None:
    text = cfg_text(name)
    with refused(ConfigError, "darknet.unsupported") as caught:
        read_cfg(text)
    assert REFUSED[name] in caught.value.what


@pytest.mark.data
def test_the_18_layer_network_has_the_papers_shapes_and_size() -> None:
    model, shape = cfg("cifar.2017").model, cfg("cifar.2017").record
    of = {128: (28, 28), 256: (14, 14), 512: (7, 7)}
    kinds = [128, 128, 128, 0, 0, 256, 256, 256, 0, 0, 512, 512, 512, 0]
    shapes = layer_shapes(model, shape)
    assert [s for k, s in zip(kinds, shapes[1:], strict=False) if k] == [(k, *of[k]) for k in kinds if k]
    assert shapes[4:6] == ((128, 14, 14),) * 2
    assert shapes[9:11] == ((256, 7, 7),) * 2
    assert shapes[14:] == ((512, 7, 7), (10, 7, 7), (10,))
    state = state_of(build(model, input_shape=shape))
    assert sum(v.numel() for name, v in state.items() if "num_batches" not in name) == 7_687_050
    assert round(macs(model, shape) / 1e6) == 812
    upto = ModelSpec(layers=(*model.layers[:4], AvgPool()), size=(28, 28))
    assert macs(upto, shape) / macs(model, shape) == pytest.approx(0.288, abs=0.0005)


@pytest.mark.data
def test_the_two_ways_to_write_a_crop_give_the_same_layers() -> None:
    older, newer = cfg("cifar.2016"), cfg("cifar.2017")
    assert older.model == newer.model
    assert older.augment == Augment(flip=True)
    assert newer.augment == Augment(
        flip=True, min_crop=32, max_crop=32, hue=0.1, saturation=0.333333, exposure=0.333333
    )


@pytest.mark.data
def test_the_hyper_parameters_of_the_18_layer_network() -> None:
    found = cfg("cifar.2017")
    expected = TrainingSpec(
        epochs=13,  # 5000 batches of 390 each
        batch=128,
        learning_rate=0.4,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="poly",
        power=4.0,
        max_steps=5000,
        augment=found.augment,
    )
    assert found.training(records=50_000) == expected
    assert found.training(epochs=12) == msgspec.structs.replace(expected, epochs=12, max_steps=0)
    assert (found.mean, found.std, found.channels) == (0.0, 1.0, 3)


@pytest.mark.data
def test_densely_connected_layers_read_what_the_file_says() -> None:
    model = cfg("densenet201").model
    routes = [(i, layer.sources) for i, layer in enumerate(model.layers) if isinstance(layer, Route)]
    assert len(routes) == 98
    assert all(sources == (i - 1, i - 3) for i, sources in routes)
    assert layer_shapes(model, (3, 256, 256))[-3] == (512 + 32 * 32, 8, 8)  # 512, and 32 in each of 32


# --- sections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        (CONV, Conv(filters=4)),
        (f"{CV}filters=4\nsize=5\npad=1\n{LEAKY}", Conv(filters=4, kernel=5, padding=2, activation="leaky")),
        (f"{CV}filters=4\nsize=3\npadding=2\nactivation=linear\n", Conv(filters=4, padding=2, activation="none")),
        (f"{CV}activation=relu\n", Conv(filters=1, kernel=1, padding=0)),
        (
            f"{CV}batch_normalize=1\nstride=2\nsize=3\ngroups=1\n{LEAKY}",
            Conv(filters=1, stride=2, padding=0, batch_norm=True, activation="leaky"),
        ),
        ("[maxpool]\nsize=2\nstride=2\n", MaxPool()),
        ("[maxpool]\nsize=3\nstride=2\n", MaxPool(kernel=3, stride=2, padding=2)),
        ("[maxpool]\nsize=3\nstride=2\npadding=0\n", MaxPool(kernel=3, stride=2)),
        ("[maxpool]\nsize=2\nstride=1\n", MaxPool(kernel=2, stride=1, padding=1)),
        ("[maxpool]\nstride=3\n", MaxPool(kernel=3, stride=3, padding=2)),
        ("[dropout]\n", Dropout(p=0.5)),
        ("[dropout]\nprobability=.25\n", Dropout(p=0.25)),
    ],
)
def test_a_section_becomes_a_layer(text: str, layer: Layer) -> None:
    assert layers(text) == (layer, Flatten(), Linear(units=5))


def test_a_margin_of_a_pooling_is_dropped_only_where_it_makes_no_window() -> None:
    odd = "[net]\nheight=7\nwidth=6\nchannels=1\n"
    found = read("[maxpool]\nsize=2\nstride=2\n", END, net=odd)
    assert found.model.layers[0] == MaxPool(padding=1)
    assert layer_shapes(found.model, found.record)[1] == (1, 4, 3)
    # A margin of 2 lies on both sides: no more windows, but others.
    moved = read("[maxpool]\nsize=3\nstride=3\n", END, net="[net]\nheight=9\nwidth=6\nchannels=1\n")
    assert moved.model.layers[0] == MaxPool(kernel=3, stride=3, padding=2)
    assert layer_shapes(moved.model, moved.record)[1] == (1, 3, 2)


def test_blanks_and_comments_are_nothing() -> None:
    text = "# a\n; b\n [ net ]\r\n height = 8\n\twidth=6\n\nchannels =3\n# [maxpool]\n"
    assert read(CONV, END, net=text) == read(CONV, END)


def test_a_convolution_of_a_single_pixel_is_a_linear_layer() -> None:
    one = "[convolutional]\nfilters=5\nsize=1\npad=1\nactivation=linear\n"
    found = read(CONV, "[avgpool]\n", one, "[softmax]\n")
    assert found.model.layers == (Conv(filters=4), AvgPool(), Linear(units=5))


def test_an_image_before_softmax_is_flattened() -> None:
    found = read(CONV, "[softmax]\ngroups=1\n[cost]\n")
    assert found.model.layers == (Conv(filters=4), Flatten())
    assert found.classes == 4 * 8 * 6


def test_numbers_relative_and_absolute_mean_the_same_layer() -> None:
    expected = (Conv(filters=4), Conv(filters=4), Shortcut(source=0, activation="leaky"), Route(sources=(2, 0)))
    for one, two in (("-2", "-1,-3"), ("0", "2, 0")):
        found = layers(CONV, CONV, f"[shortcut]\nfrom={one}\nactivation=leaky\n", f"[route]\nlayers={two}\n")
        assert found[:4] == expected


def test_a_crop_is_a_layer_to_darknet_and_shifts_its_numbers() -> None:
    crop = "[crop]\ncrop_height=6\ncrop_width=4\nnoadjust=1\n"
    found = read(crop, CONV, CONV, "[shortcut]\nfrom=1\n", "[route]\nlayers=-3,0\n", END)
    assert found.model.size == (6, 4)
    assert found.record == (3, 8, 6)
    assert found.model.layers[2:4] == (Shortcut(source=0), Route(sources=(0, -1)))


def test_a_flatten_that_was_put_in_shifts_our_numbers() -> None:
    wide = "[connected]\noutput=7\nactivation=relu\n"
    found = layers(CONV, wide, wide, "[route]\nlayers=1,-1\n", "[shortcut]\nfrom=-1\n")
    assert found[1:6] == (
        Flatten(), Linear(units=7, activation="relu"), Linear(units=7, activation="relu"), Route(sources=(2, 3)),
        Shortcut(source=4),
    )  # fmt: skip


def test_what_a_crop_draws_and_how_it_maps_pixels() -> None:
    crop = "[crop]\ncrop_height=8\ncrop_width=6\nflip=1\nangle=7\nsaturation=1.5\nexposure=.5\n"
    found = read(crop, CONV, END)
    assert found.augment == Augment(flip=True, angle=7, saturation=0.5, exposure=1.0)
    assert (found.mean, found.std) == (0.5, 0.5)
    assert read(crop.replace("flip=1", "noadjust=1"), CONV, END).augment.flip is False


@pytest.mark.parametrize(
    ("keys", "crops"),
    [("", (0, 0)), ("max_crop=9\n", (6, 9)), ("min_crop=5\n", (5, 12)), ("min_crop=4\nmax_crop=7\n", (4, 7))],
)
def test_scaling_has_darknets_defaults_once_it_is_asked_for(keys: str, crops: tuple[int, int]) -> None:
    augment = read(CONV, END, net=NET + keys).augment
    assert (augment.min_crop, augment.max_crop) == crops


def test_all_keys_of_a_network_are_honoured() -> None:
    keys = (
        "batch=16\nsubdivisions=4\nlearning_rate=1e-2\nmomentum=.8\ndecay=.001\npolicy=poly\npower=2\nburn_in=10\n"
        "max_batches=100\nflip=0\nangle=7\naspect=.75\nhue=.1\nsaturation=1.25\nexposure=2\n"
    )
    found = read(CONV, END, net=NET + keys)
    assert found.training(records=170) == TrainingSpec(
        epochs=10,
        batch=16,
        learning_rate=0.01,
        momentum=0.8,
        weight_decay=0.001,
        schedule="poly",
        power=2.0,
        max_steps=100,
        burn_in=10,
        augment=Augment(angle=7, aspect=0.333333, hue=0.1, saturation=0.25, exposure=1.0),
    )


def test_a_network_without_keys_has_darknets_defaults() -> None:
    found = read(CONV, END)
    assert found.training(epochs=2) == TrainingSpec(
        epochs=2, batch=1, learning_rate=0.001, momentum=0.9, weight_decay=1e-4, schedule="constant",
        augment=Augment(flip=True),
    )  # fmt: skip


@pytest.mark.parametrize(("net", "records"), [(NET, 100), (NET + "max_batches=5\nbatch=8\n", 7), (NET, None)])
def test_epochs_must_come_from_somewhere(net: str, records: int | None) -> None:
    with refused(ConfigError, "darknet.no-epochs"):
        read(CONV, END, net=net).training(records=records)


# --- refusals ---------------------------------------------------------------------------------------------------

UNSUPPORTED = [
    ((NET, "policy=steps\n", CONV, END), "line 5: not supported: [net] policy=steps"),
    ((NET, "adam=1\n", CONV, END), "line 5: not supported: [net] adam"),
    ((NET, "hue=.1\n", "[crop]\ncrop_height=8\ncrop_width=6\n", CONV, END), "line 5: not supported: [net] hue"),
    ((NET, "[crop]\nshift=.1\n", CONV, END), "line 6: not supported: [crop] shift"),
    ((NET, "[yolo]\n", END), "line 5: not supported: [yolo]"),
    ((NET, CONV, "[crop]\n", END), "line 10: not supported: [crop]"),
    ((NET, CONV, "groups=2\n", END), "line 10: not supported: [convolutional] groups=2"),
    ((NET, "[convolutional]\nfilters=4\n", END), "[convolutional] activation=logistic; supported: relu, leaky, linear"),
    ((NET, CONV.replace("relu", "mish"), END), "[convolutional] activation=mish"),
    ((NET, CONV, "xnor=1\n", END), "[convolutional] xnor"),
    ((NET, "[connected]\noutput=3\nbatch_normalize=1\n", END), "[connected] batch_normalize=1"),
    ((NET, "[connected]\noutput=3\n", END), "[connected] activation=logistic"),
    ((NET, CONV, "[avgpool]\n", CONV, END), "on a single pixel"),
    ((NET, CONV, "[avgpool]\n", "[avgpool]\n", END), "[avgpool]: layer 2"),
    ((NET, "[maxpool]\nsize=9\npadding=0\n", END), "[maxpool]: layer 0: a window of 9 does not fit"),
    ((NET, CONV, CONV.replace("=4", "=5"), "[shortcut]\nfrom=-2\n", END), "[shortcut]: layer 2 (shortcut) cannot join"),
    ((NET, CONV, "[avgpool]\n[route]\nlayers=0,1\n", END), "[route]: layer 2 (route) cannot join"),
    ((NET, CONV, END, "tree=a\n"), "[softmax] tree"),
    ((NET, CONV, END, "groups=2\n"), "[softmax] groups=2"),
    ((NET, CONV, END, "[softmax]\n"), "line 14: not supported: [softmax] at this place"),
    ((NET, CONV, END, CONV), "line 14: not supported: [convolutional] at this place"),
    ((NET, CONV, "[cost]\n", END), "line 10: not supported: [cost] at this place"),
    ((NET, CONV, END, "[cost]\ntype=smooth\n"), "[cost] type=smooth"),
    ((NET, CONV, END, "[cost]\nscale=2\n"), "[cost] scale=2"),
    ((NET, CONV), "a network that does not end in [softmax]"),
    ((NET,), "a network that does not end in [softmax]"),
    ((NET, "[dropout]\n" * 513, END), "line 517: not supported: more than 512 layers"),
]


@pytest.mark.parametrize(("parts", "what"), UNSUPPORTED, ids=[what for _, what in UNSUPPORTED])
def test_what_is_not_supported_is_refused_by_line_and_name(parts: tuple[str, ...], what: str) -> None:
    with refused(ConfigError, "darknet.unsupported") as caught:
        read_cfg("".join(parts).encode())
    assert what in caught.value.what


MALFORMED = [
    (b"", "line 1: the first section is not [net]"),
    (CONV.encode(), "line 1: the first section is not [net]"),
    (b"height=3\n", "line 1: neither a section nor a key of one"),
    (b"[net]\nheight\n", "line 2: neither a section nor a key of one"),
    (b"[net]\n=3\n", "line 2: neither a section nor a key of one"),
    (b"[net\n", "line 1: no section"),
    (b"\xff", "line 1: not UTF-8 at byte 0"),
    (b"[net]\nwidth=1\nwidth=1\n", "line 3: [net] has 'width' twice"),
    (b"[net]\n" + b"".join(b"a%d=1\n" % i for i in range(65)), "line 66: [net] has 'a64' twice, or more than 64 keys"),
    (b"#" * 1001, "line 1: longer than 1000 characters"),
    (b"[net]\n" * 1025, "line 1025: no section, or more than 1024"),
    (b"\n" * (darknet_text.MAX_CFG_BYTES + 1), "line 1: 262145 bytes; the limit is 262144"),
    (b"[net]\nheight=8\nwidth=6\n", "line 1: channels='0' is no whole number from 1 to 4096"),
    (b"[net]\nchannels=3\nheight=0\nwidth=6\n", "line 3: height='0'"),
    (b"[net]\nchannels=3\nheight=8\nwidth=5000\n", "line 4: width='5000' is no whole number from 1 to 4096"),
    ((NET + END.replace("[connected]\noutput=5\nactivation=linear\n", "")).encode(), "line 5: fewer than two layers"),
]
BAD_VALUES = [
    (NET, "batch=0"),
    (NET, "learning_rate=0"),
    (NET, "learning_rate=1e999"),
    (NET, "learning_rate=nan"),
    (NET, "momentum=1"),
    (NET, "power=-1"),
    (NET, "saturation=0"),
    (NET, "hue=2"),
    (NET, "flip=2"),
    (NET, "min_crop=9\nmax_crop=8"),
    (NET, "burn_in=9999999999"),
    (NET + CONV, "stride=0"),
    (NET + CONV, "batch_normalize=2"),
    (NET + CONV, "stride=1.5"),
    (NET + CONV, "stride=\u0661"),
    (NET + CONV, "padding=65"),
    (NET + "[convolutional]\n", "filters=65537"),
    (NET + "[maxpool]\nsize=2\n", "padding=2"),
    (NET + "[dropout]\n", "probability=1"),
    (NET + CONV + "[route]\n", "layers="),
    (NET + CONV + "[route]\n", "layers=-1,,0"),
    (NET + CONV + "[route]\n", "layers=" + ",".join(["0"] * 33)),
    (NET + CONV + "[shortcut]\n", "from=0,0"),
    (NET + "[crop]\ncrop_height=8\n", "crop_width=7"),
]


@pytest.mark.parametrize(("text", "what"), MALFORMED, ids=[what[:50] for _, what in MALFORMED])
def test_text_that_is_no_network_is_refused_by_line(text: bytes, what: str) -> None:
    with refused(ConfigError, "darknet.malformed") as caught:
        read_cfg(text)
    assert caught.value.what.startswith(what)


@pytest.mark.parametrize(("before", "key"), BAD_VALUES, ids=[key[:30] for _, key in BAD_VALUES])
def test_a_value_out_of_bounds_is_refused_by_line_and_key(before: str, key: str) -> None:
    with refused(ConfigError, "darknet.malformed") as caught:
        read_cfg(f"{before}{key}\n{END}".encode())
    line = before.count("\n") + 1 + key.count("\n")
    name, _, value = key.rsplit("\n", maxsplit=1)[-1].partition("=")
    assert caught.value.what.startswith(f"line {line}: {name}='{value[:40]}")


@pytest.mark.parametrize("source", ["1", "-2", "7", "-9"])
@pytest.mark.parametrize("section", ["[shortcut]\nfrom=", "[route]\nlayers="])
def test_a_layer_reads_only_those_before_it(section: str, source: str) -> None:
    with refused(ConfigError, "darknet.malformed") as caught:
        layers(CONV, f"{section}{source}\n")
    assert "which is not before it" in caught.value.what


def test_a_model_beyond_all_measure_is_refused() -> None:
    wide = "[convolutional]\nfilters=65536\nsize=1\nactivation=relu\n"
    with refused(ConfigError, "model.too-large"):
        read(wide, wide, END)


# --- hostile text -----------------------------------------------------------------------------------------------

_KEYS = ["filters", "size", "stride", "pad", "padding", "activation", "layers", "from", "output", "batch_normalize"]
_KEYS += ["height", "width", "channels", "batch", "policy", "max_crop", "min_crop", "hue", "probability", "groups"]
_VALUES = st.one_of(
    st.integers(-70_000, 70_000).map(str),
    st.floats().map(str),
    st.sampled_from(["relu", "leaky", "linear", "poly", "-1,-2", ""]),
    st.text(max_size=5),
)
_KINDS = ["convolutional", "maxpool", "avgpool", "connected", "dropout", "route", "shortcut", "softmax", "cost", "crop"]
_LINES = st.one_of(
    st.sampled_from([f"[{kind}]" for kind in [*_KINDS, "net"]]),
    st.tuples(st.sampled_from(_KEYS), _VALUES).map("=".join),
    st.text(max_size=8),
)
_SECTIONS = st.sampled_from(
    [CONV, END, "[maxpool]\nsize=2\nstride=2\n", "[route]\nlayers=-1,-2\n", "[shortcut]\nfrom=-2\n", "[avgpool]\n"]
)


def _reads_or_is_refused(text: bytes) -> None:
    try:
        found = read_cfg(text)
    except ConfigError:
        return
    training = found.training(epochs=1)
    assert msgspec.convert(msgspec.to_builtins(found.model), ModelSpec) == found.model
    assert msgspec.convert(msgspec.to_builtins(training), TrainingSpec) == training
    assert layer_shapes(found.model, found.record)[-1] == (found.classes,)


@quick
@given(st.binary(max_size=400))
def test_any_bytes_read_or_are_refused(text: bytes) -> None:
    _reads_or_is_refused(text)


@quick
@given(st.lists(st.one_of(_LINES, _SECTIONS), max_size=30), st.booleans())
def test_any_sections_and_keys_read_or_are_refused(lines: list[str], whole: bool) -> None:
    body = "\n".join(lines)
    _reads_or_is_refused((f"{NET}{body}\n{END}" if whole else body).encode("utf-8", "surrogatepass"))


@quick
@given(st.lists(_SECTIONS, max_size=12), st.data())
def test_a_network_with_one_byte_changed_reads_or_is_refused(parts: list[str], data: st.DataObject) -> None:
    raw = bytearray("".join((NET, CONV, *parts, END)).encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    _reads_or_is_refused(bytes(raw))
