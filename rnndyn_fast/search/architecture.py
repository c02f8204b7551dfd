"""The architectures that a search chooses from: a stem, layers of one kind of cell, feedback between layers, and a readout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rnndyn_fast.graph.spec.network import (
    Activation,
    Area,
    Connection,
    Input,
    Interaction,
    Network,
    Norm,
    Operator,
    Pool,
    Readout,
    Role,
    Unroll,
)
from rnndyn_fast.nn.cell_graphs import add_cell, sequence
from rnndyn_fast.nn.graph_builder import CellSpec, Graph, Source
from rnndyn_fast.search import reciprocal_choices
from rnndyn_fast.search.reciprocal_choices import (
    DEFAULTS,
    LAYER,
    RECIPROCAL,
    cell_options,
    check_choice_of_cell,
    of,
    reads_residual,
)
from rnndyn_fast.suggestions import check_choice, others

# Names of this module -> those of nn.cell_graphs; the others are convolutional layers without a cell of their own.
GATED = {
    "timedecay": "timedecay", "simplernn": "simplernn", "gru": "gru", "lstm": "lstm", "ugrnn": "ugrnn",
    "intersectionrnn": "intersectionrnn", "rgc": "rgc_shallow", "rgc_separable": "rgc_median", RECIPROCAL: "rgc",
}  # fmt: skip
FEEDFORWARD, BLT = "feedforward", "blt"
CELLS = (FEEDFORWARD, BLT, *GATED)
_WITHOUT_KERNEL = ("timedecay", "rgc_separable", RECIPROCAL)  # (the published 7 x 7 gates; kernels of their own)
_RECIPROCAL = ("rgc", "rgc_separable", RECIPROCAL)
_WITH_LAYER_NORM = ("simplernn", "gru", "lstm", "intersectionrnn")
# Choices that a layer may have for itself.
PER_LAYER = (
    "width", "kernel_size", "norm", "cell", "cell_kernel_size", "interaction", "cell_norm", "peepholes", "gating", "bypass",
    "memory_ratio", *DEFAULTS,
)  # fmt: skip
Scalar = bool | int | float | str


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Architecture:
    """One architecture; each field is a choice that a search space may leave open.

    The network::

        stem     = relu(norm(conv(image)))
        layer i  : 2 x 2 maximum of the layer below (but for the first layer), then its cell, then the bypass
        gap      = mean over the last layer's map, read out linearly

    A layer with a gated cell has a convolution (norm, relu) before the cell. The cell "blt" is the convolution with a lateral one added
    or multiplied; "feedforward" is the convolution alone: the control.

    >>> Architecture(depth=2, cell="gru", feedback=((2, 1),)).widths
    (16, 24)
    """

    depth: int = _option(2, "layers after the stem")
    width: int = _option(16, "channels of stem and first layer")
    growth: float = _option(1.5, "channels of a layer divided by those of the layer below")
    stem_kernel_size: int = _option(3, "kernel of the stem")
    stem_stride: int = _option(1, "of the stem: 2 halves the maps of all layers")
    kernel_size: int = _option(3, "kernels of bottom-up convolutions")
    norm: str = _option("layer", "after bottom-up convolutions: layer, group or none")
    cell: str = _option(BLT, "recurrence within layers")
    cell_kernel_size: int = _option(3, "kernels of the recurrent convolutions")
    interaction: str = _option("additive", "of blt: additive or multiplicative")
    cell_norm: bool = _option(False, "layer norm within simplernn, gru, lstm, intersectionrnn")
    peepholes: bool = _option(False, "of lstm")
    gating: bool = _option(True, "of rgc, rgc_separable, reciprocal: the halves gate each other")
    memory_ratio: float = _option(1.0, "of reciprocal: channels of the cell memory divided by those of the layer")
    reciprocal: tuple[tuple[str, Scalar], ...] = _option((), "of reciprocal: its choices (rgc_...) by name; the others are published")
    layers: tuple[tuple[int, str, Scalar], ...] = _option((), "choices of single layers: (layer, name, value)")
    bypass: bool = _option(False, "a layer's input, pooled, is added to its output (1 x 1 convolution where channels differ)")
    feedback: tuple[tuple[int, int], ...] = _option((), "pairs (from, to) of layers, 1-based, from > to")
    feedback_kernel_size: int = _option(3, "kernels of the feedback convolutions")
    unroll: str = _option("engineering", "engineering or biological")

    def __post_init__(self) -> None:
        if not isinstance(self.feedback, list | tuple) or not all(isinstance(edge, list | tuple) for edge in self.feedback):
            raise ValueError(f"feedback: expected pairs (from, to) of layers, got {self.feedback!r}")
        object.__setattr__(self, "feedback", tuple(tuple(edge) for edge in self.feedback))
        check_choice("cell", self.cell, CELLS)
        check_choice("interaction", self.interaction, [word.value for word in Interaction if word is not Interaction.SQUASHED])
        check_choice("norm", self.norm, [Norm.LAYER.value, Norm.GROUP.value, Norm.NONE.value])
        check_choice("unroll", self.unroll, [word.value for word in Unroll])
        for name in ("depth", "width", "stem_stride", "stem_kernel_size", "kernel_size", "cell_kernel_size", "feedback_kernel_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
            if name.endswith("kernel_size") and value % 2 == 0:
                raise ValueError(f"{name}: expected an odd number, got {value}")
        for name in ("growth", "memory_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
        for name in ("cell_norm", "peepholes", "gating", "bypass"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        for edge in self.feedback:
            if len(edge) != 2 or not self.depth >= edge[0] > edge[1] >= 1:
                raise ValueError(f"feedback: expected pairs (from, to) with {self.depth} >= from > to >= 1, got {edge}")
        if len(set(self.feedback)) != len(self.feedback):
            raise ValueError(f"feedback: expected every edge once, got {self.feedback}")
        for name, value in self.reciprocal:
            if name not in DEFAULTS:
                raise ValueError(f"reciprocal: unknown choice {name!r}{others(name, DEFAULTS)}")
            check_choice_of_cell(name, value)
        for number, name, _ in self.layers:
            if not 1 <= number <= self.depth or name not in PER_LAYER:
                raise ValueError(f"layers: expected (layer of 1 .. {self.depth}, one of {list(PER_LAYER)}, value), got {(number, name)}")
        named = [(number, name) for number, name, _ in self.layers]
        twice = [one for one in named if named.count(one) > 1]
        if twice:
            raise ValueError(f"layers: expected each choice of a layer once, got layer{twice[0][0]}_{twice[0][1]} twice")
        for number in {number for number, *_ in self.layers}:
            self.layer(number)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the layers, rounded to even numbers."""
        own = {number: value for number, name, value in self.layers if name == "width"}
        return tuple(int(own.get(k + 1, max(2, 2 * round(self.width * self.growth**k / 2)))) for k in range(self.depth))

    def layer(self, number: int) -> Architecture:
        """The architecture with a layer's own choices as those of all."""
        own = {name: value for layer, name, value in self.layers if layer == number}
        cell = {**dict(self.reciprocal), **{name: value for name, value in own.items() if name in DEFAULTS}}
        rest: dict[str, Any] = {name: value for name, value in own.items() if name not in DEFAULTS}
        return dataclasses.replace(self, layers=(), reciprocal=tuple(cell.items()), **rest)

    def choices(self, number: int) -> dict[str, Any]:
        """The choices of a layer by name, and the feedback that enters it."""
        one = self.layer(number)
        named = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
        return {**named, **dict(one.reciprocal), "feedback": tuple(edge for edge in self.feedback if edge[1] == number)}


# Choices that mean nothing with other values of other choices, and when they do mean something.
MEANT: dict[str, Callable[[dict[str, Any]], bool]] = {
    "cell_kernel_size": lambda a: a["cell"] not in (FEEDFORWARD, *_WITHOUT_KERNEL),
    "interaction": lambda a: a["cell"] == BLT,
    "cell_norm": lambda a: a["cell"] in _WITH_LAYER_NORM,
    "peepholes": lambda a: a["cell"] == "lstm",
    "gating": lambda a: a["cell"] in _RECIPROCAL,
    "growth": lambda a: a["depth"] > 1,
    "memory_ratio": lambda a: a["cell"] == RECIPROCAL and of(a, "gate_kernel_size") != 0,
    "feedback_kernel_size": lambda a: bool(a["feedback"]) and (a["cell"] != RECIPROCAL or of(a, "feedback_entry") == LAYER),
    **reciprocal_choices.MEANT,
}


def build_network(
    architecture: Architecture, *, image_size: int, num_classes: int, in_channels: int = 3, name: str = "searched"
) -> Network:
    """The spec of an architecture.

    Feedback enters a layer's first convolution. Where the layer above has half the size it is a transposed convolution, elsewhere
    a convolution of the map resized bilinearly.

    Raises:
        ValueError: the image is too small for so many layers, or for a kernel that was chosen (published ones are cut).

    >>> build_network(Architecture(depth=1), image_size=8, num_classes=10).areas[1].name
    'layer1'
    """
    a = architecture
    for argument, value in (("image_size", image_size), ("num_classes", num_classes), ("in_channels", in_channels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}: expected an int of at least 1, got {value!r}")
    if _map_size(a, a.depth, image_size) < 2:
        stride = f", stem_stride: {a.depth} layers after a stem of stride {a.stem_stride}" if a.stem_stride > 1 else f": {a.depth} layers"
        raise ValueError(f"depth{stride} make maps of {image_size} px smaller than 2 x 2")
    _check_kernels(a, image_size)
    norm = Norm(a.norm)
    graph = Graph([Area("stem", a.width, norm=norm)])
    stem: dict[str, Any] = {"kernel_size": a.stem_kernel_size, "stride": a.stem_stride, "bias": norm is Norm.NONE}
    graph.connections.append(Connection("image", "stem", Role.BOTTOM_UP, **stem))
    below, channels = "stem", a.width
    for i, width in enumerate(a.widths, start=1):
        pool = Pool.NONE if i == 1 else Pool.MAX
        _layer(graph, a, i, width, below, channels, pool)
        below, channels = f"layer{i}", width
    for source, target in a.feedback:
        if not _enters_cell(a.choices(target)):
            _feedback(graph, a, source, target, image_size)
    graph.areas.append(Area("gap", channels, norm=Norm.NONE, activation=Activation.IDENTITY))
    graph.connections.append(Connection(below, "gap", Role.BOTTOM_UP, Operator.IDENTITY, pool=Pool.MEAN))
    return Network(
        name,
        (Input("image", in_channels, image_size, image_size),),
        tuple(graph.areas),
        tuple(graph.connections),
        Unroll(a.unroll),
        Readout("gap", num_classes),
    )


def _map_size(a: Architecture, layer: int, image_size: int) -> int:
    """Height and width of a layer's maps."""
    return -(-image_size // a.stem_stride) >> (layer - 1)


def _check_kernels(a: Architecture, image_size: int) -> None:
    """Raise ``ValueError`` for a chosen kernel of which a part lies beyond the map wherever it is put: that part would do nothing."""
    if a.stem_kernel_size > 2 * image_size - 1:
        raise ValueError(f"stem_kernel_size: expected at most {2 * image_size - 1} on {image_size} px, got {a.stem_kernel_size}")
    for number in range(1, a.depth + 1):
        choices, size = a.choices(number), _map_size(a, number, image_size)
        chosen = dict(a.reciprocal) | {name: value for layer, name, value in a.layers if layer == number}
        for name, value in choices.items():
            own = name in chosen if name in DEFAULTS else True  # (the published kernels of the cell are cut)
            if name.endswith("kernel_size") and name != "stem_kernel_size" and own and (name not in MEANT or MEANT[name](choices)):
                largest = max(value) if isinstance(value, list | tuple) else value
                if largest > 2 * size - 1:
                    raise ValueError(f"{name}: expected at most {2 * size - 1} on the map of layer {number}, {size} x {size}, got {value}")


def _entry(a: Architecture, layer: str) -> str:
    """The area of a layer that its convolution, and feedback, enter."""
    return f"{layer}.in" if a.cell in GATED else f"{layer}.conv" if a.bypass else layer


def _enters_cell(choices: dict[str, Any]) -> bool:
    return choices["cell"] == RECIPROCAL and of(choices, "feedback_entry") != LAYER


def _layer(graph: Graph, whole: Architecture, number: int, width: int, below: str, channels: int, pool: Pool) -> None:
    a, layer = whole.layer(number), f"layer{number}"
    bias = a.norm == "none"
    entry = _entry(a, layer)
    interaction = Interaction(a.interaction) if a.cell == BLT else Interaction.ADDITIVE
    graph.areas.append(Area(entry, width, interaction, Norm(a.norm)))
    graph.connections.append(Connection(below, entry, Role.BOTTOM_UP, kernel_size=a.kernel_size, pool=pool, bias=bias))
    last = entry
    if a.cell == BLT:
        graph.connections.append(Connection(entry, entry, Role.LATERAL, kernel_size=a.cell_kernel_size, bias=bias))
    elif a.cell in GATED:
        last = f"{layer}.cell" if a.bypass else layer
        spec = CellSpec(last, Source(entry, width), width, last)
        if a.cell == RECIPROCAL:
            _reciprocal(graph, whole, number, spec, Source(below, channels, None), pool)
        else:
            _cell(graph, a, spec)
    if a.bypass:
        graph.areas.append(Area(layer, width, norm=Norm.NONE))
        graph.connections.append(Connection(last, layer, Role.BOTTOM_UP, Operator.IDENTITY, delay=0))
        operator = Operator.IDENTITY if channels == width else Operator.CONV
        parameter = None if channels == width else f"{layer}.bypass"
        graph.connections.append(Connection(below, layer, Role.BOTTOM_UP, operator, pool=pool, parameter=parameter))


def _cell(graph: Graph, a: Architecture, spec: CellSpec) -> None:
    options: dict[str, Any] = {} if a.cell in _WITHOUT_KERNEL else {"kernel_size": a.cell_kernel_size}
    if a.cell in _WITH_LAYER_NORM:
        options["layer_norm"] = a.cell_norm
    if a.cell == "rgc_separable":
        options |= {"cell_channels": spec.channels, "input_activation": "identity"}  # (x is rectified already)
    if a.cell == "lstm":
        options["peepholes"] = a.peepholes
    if a.cell in _RECIPROCAL:
        options["gating"] = a.gating
    add_cell(graph, GATED[a.cell], spec, **options)


def _reciprocal(graph: Graph, whole: Architecture, number: int, spec: CellSpec, below: Source, pool: Pool) -> None:
    choices = whole.choices(number)
    options = cell_options(choices)
    options["cell_channels"] = max(1, round(choices["memory_ratio"] * spec.channels))
    if reads_residual(options):
        area = f"layer{number}.below"
        graph.areas.append(Area(area, below.channels, norm=Norm.NONE, activation=Activation.IDENTITY))
        graph.identity(below, area, Role.BOTTOM_UP, pool=pool)
        spec = dataclasses.replace(spec, residual=Source(area, below.channels, 0))
    if _enters_cell(choices):
        sources = sequence([Source(f"layer{source}", whole.widths[source - 1], 1) for source, _ in choices["feedback"]])
        spec = dataclasses.replace(spec, feedback=tuple(sources))
    add_cell(graph, GATED[RECIPROCAL], spec, **options)


def _feedback(graph: Graph, whole: Architecture, source: int, target: int, image_size: int) -> None:
    a = whole.layer(target)
    area, entry, bias = f"layer{source}", _entry(a, f"layer{target}"), a.norm == "none"
    parameter = f"feedback_{source}_{target}"
    options: dict[str, Any] = {"kernel_size": a.feedback_kernel_size, "bias": bias, "parameter": parameter, "delay": 1}
    sizes = [_map_size(whole, layer, image_size) for layer in (source, target)]
    if sizes[1] == 2 * sizes[0] and a.feedback_kernel_size > 1:
        graph.connections.append(Connection(area, entry, Role.TOP_DOWN, Operator.CONV_TRANSPOSE, stride=2, **options))
    else:
        graph.connections.append(Connection(area, entry, Role.TOP_DOWN, resize=True, **options))


def count_parameters(network: Network) -> int:
    """Numbers that are trained, the readout's included."""
    total = 0
    for shape in network.parameter_shapes.values():
        product = 1
        for n in shape:
            product *= n
        total += product
    if network.readout is not None and network.readout.parameter is not None:
        features = network.shapes[network.readout.source][0]
        total += network.readout.num_classes * (features + network.readout.bias)
    return total
