"""The layers of a Darknet .cfg file, section by section, under our numbers. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable

from caltrain.errors import ConfigError
from caltrain.models import layers as m
from caltrain.models.darknet_text import Section, malformed, unsupported
from caltrain.models.layers import MAX_LAYERS, Activation, Layer, Shape, shape_of, sources_of
from caltrain.models.spec import ModelSpec

_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "leaky": "leaky", "linear": "none"}
_WIDTH, _WINDOW = 65_536, 64


class Layers:
    """The model as it grows, section by section."""

    def __init__(self, first: Shape, *, shift: bool) -> None:
        self._layers: list[Layer] = []
        self._shapes: list[Shape] = [first]  # entry i + 1 is what layer i gives
        self._number = [-1] if shift else []  # by Darknet's number: the layer whose output that is
        self._ended = False

    def add(self, section: Section) -> None:
        """Raises ConfigError `darknet.unsupported`, `darknet.malformed`."""
        if section.kind not in _MAKERS or self._ended != (section.kind == "cost"):
            raise unsupported(section.line, f"[{section.kind[:60]}] at this place")
        made = _MAKERS[section.kind](self, section)
        section.close()
        if made is not None:
            self._append(made, section)
        self._number.append(len(self._layers) - 1)

    def model(self, size: tuple[int, int], *, end: int) -> ModelSpec:
        """The whole. Raises ConfigError `darknet.unsupported`, `darknet.malformed`."""
        if not self._ended:
            raise unsupported(end, "a network that does not end in [softmax]")
        if len(self._layers) < 2:
            raise malformed(end, "fewer than two layers")
        return ModelSpec(layers=tuple(self._layers), size=size)

    @property
    def shape(self) -> Shape:
        """What the last layer gives."""
        return self._shapes[-1]

    def _append(self, layer: Layer, section: Section) -> None:
        index = len(self._layers)
        if index == MAX_LAYERS:
            raise unsupported(section.line, f"more than {MAX_LAYERS} layers")
        try:
            self._shapes.append(shape_of(index, layer, [self._shapes[s + 1] for s in sources_of(index, layer)]))
        except ConfigError as error:
            raise unsupported(section.line, f"[{section.kind}]: {error.what}") from None
        self._layers.append(layer)

    def _source(self, section: Section, number: int) -> int:
        """Our number of a layer in Darknet's: counted from the start, or back from here."""
        cfg = number if number >= 0 else len(self._number) + number
        if not 0 <= cfg < len(self._number):
            raise malformed(section.line, f"[{section.kind}] reads layer {number}, which is not before it")
        return self._number[cfg]

    def convolutional(self, section: Section) -> Layer:
        """On a vector, which is an image of one pixel to Darknet, a 1x1 convolution is a linear layer."""
        filters = section.integer("filters", 1, least=1, most=_WIDTH)
        kernel = section.integer("size", 1, least=1, most=_WINDOW)
        stride = section.integer("stride", 1, least=1, most=_WINDOW)
        padding = section.integer("padding", 0, most=_WINDOW)
        if section.integer("pad", 0, most=1):
            padding = kernel // 2
        norm = section.integer("batch_normalize", 0, most=1) == 1
        activation = section.choice("activation", "logistic", _ACTIVATIONS)
        section.only("groups", 1)
        if len(self.shape) == 3:
            return m.Conv(
                filters=filters, kernel=kernel, stride=stride, padding=padding, batch_norm=norm, activation=activation
            )
        if kernel != 1 or padding or norm:
            raise unsupported(section.line, "[convolutional] with size, padding or batch_normalize on a single pixel")
        return m.Linear(units=filters, activation=activation)

    def connected(self, section: Section) -> Layer:
        section.only("batch_normalize", 0)
        self._flatten(section)
        return m.Linear(
            units=section.integer("output", 1, least=1, most=_WIDTH),
            activation=section.choice("activation", "logistic", _ACTIVATIONS),
        )

    def maxpool(self, section: Section) -> Layer:
        stride = section.integer("stride", 1, least=1, most=_WINDOW)
        kernel = section.integer("size", stride, least=1, most=_WINDOW)
        padding = section.integer("padding", kernel - 1, most=kernel - 1)
        # A margin of 1 is behind the image alone. Where it makes no further window, it changes nothing.
        if padding == 1 and all((s + 1 - kernel) // stride == (s - kernel) // stride for s in self.shape[1:]):
            padding = 0
        return m.MaxPool(kernel=kernel, stride=stride, padding=padding)

    def avgpool(self, _section: Section) -> Layer:
        return m.AvgPool()

    def dropout(self, section: Section) -> Layer:
        return m.Dropout(p=section.number("probability", 0.5, most=0.9999))

    def route(self, section: Section) -> Layer:
        return m.Route(sources=tuple(self._source(section, n) for n in section.integers("layers", most=32)))

    def shortcut(self, section: Section) -> Layer:
        (number,) = section.integers("from", most=1)
        activation = section.choice("activation", "linear", _ACTIVATIONS)
        return m.Shortcut(source=self._source(section, number), activation=activation)

    def softmax(self, section: Section) -> None:
        section.only("groups", 1)
        section.only("temperature", 1)
        self._flatten(section)
        self._ended = True

    def cost(self, section: Section) -> None:
        """After a softmax, Darknet's squared error has the gradient of cross-entropy."""
        section.choice("type", "sse", {"sse": None})
        section.only("scale", 1)

    def _flatten(self, section: Section) -> None:
        if len(self.shape) == 3:
            self._append(m.Flatten(), section)


_MAKERS: dict[str, Callable[[Layers, Section], Layer | None]] = {
    "convolutional": Layers.convolutional,
    "connected": Layers.connected,
    "maxpool": Layers.maxpool,
    "avgpool": Layers.avgpool,
    "dropout": Layers.dropout,
    "route": Layers.route,
    "shortcut": Layers.shortcut,
    "softmax": Layers.softmax,
    "cost": Layers.cost,
}
