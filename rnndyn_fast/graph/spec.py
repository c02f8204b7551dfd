"""What a recurrent convolutional network is, as data: inputs, areas, connections, and the order in which time unrolls.

A network is a directed graph. Each *area* holds one map [C, H, W] per time step. Each *connection* applies a linear map (or the
identity) to the map of its source and feeds its target. One area at one time step computes::

    drive      = sum over bottom-up connections (multiplicative), or over all connections (additive)
    modulator  = 1 + sum over lateral and top-down connections                       (multiplicative only)
    value      = drive * modulator
    state      = activation(norm(value))

A connection whose source has no state yet is left out (at the first time step there is no lateral and no top-down term); an area none of
whose drive terms is there yet has no state itself. Absent is not zero: a bias is added only with the term it belongs to.

Source: Thorat, Doerig & Kietzmann, "Characterising representation dynamics in recurrent neural networks for object recognition",
arXiv 2308.12435.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from rnndyn_fast.ops.convolution import Geometry, Operator

Shape = tuple[int, int, int]  # channels, height, width


class Role(enum.Enum):
    """The term that a connection contributes to its target."""

    BOTTOM_UP = "bottom_up"
    LATERAL = "lateral"
    TOP_DOWN = "top_down"


class Pool(enum.Enum):
    """What a connection does to the map of its source first: nothing, 2 x 2 maximum (stride 2), or the mean over the map."""

    NONE = "none"
    MAX = "max"
    MEAN = "mean"


class Interaction(enum.Enum):
    """How the terms of an area combine: ``b + l + d`` or ``b * (1 + l + d)``."""

    ADDITIVE = "additive"
    MULTIPLICATIVE = "multiplicative"


class Norm(enum.Enum):
    """Normalisation of an area's value: none, or LayerNorm over (C, H, W) with an affine value per element."""

    NONE = "none"
    LAYER = "layer"


class Activation(enum.Enum):
    """Pointwise function after the norm."""

    IDENTITY = "identity"
    RELU = "relu"


class Unroll(enum.Enum):
    """Which time step a connection reads.

    ENGINEERING: bottom-up connections read the same step, lateral and top-down ones the step before. BIOLOGICAL: every connection
    between areas takes one step; only inputs are seen at once.
    """

    ENGINEERING = "engineering"
    BIOLOGICAL = "biological"


@dataclass(frozen=True)
class Input:
    """An external map. ``frames=False``: one map for all time steps, [N, C, H, W]; True: one per step, [T, N, C, H, W]."""

    name: str
    channels: int
    height: int
    width: int
    frames: bool = False


@dataclass(frozen=True)
class Area:
    """A population with one map per time step; its height and width follow from its connections.

    ``norm_parameter`` is the prefix of its LayerNorm's parameters (``<prefix>.weight``, ``<prefix>.bias``; shape:
    :meth:`Network.norm_shape`).
    """

    name: str
    channels: int
    interaction: Interaction = Interaction.ADDITIVE
    norm: Norm = Norm.LAYER
    activation: Activation = Activation.RELU
    norm_parameter: str | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.norm is not Norm.NONE and self.norm_parameter is None:
            object.__setattr__(self, "norm_parameter", f"{self.name}_ln")


@dataclass(frozen=True)
class Connection:
    """A term of ``target`` computed from ``source``.

    ``padding=None`` keeps the size (CONV: (K-1)/2) or, transposed, doubles it with stride 2 (padding (K-1)/2, output_padding stride-1).
    ``delay`` in time steps: 0 (the source's map of the same step), 1, or None: what the network's ``unroll`` says. ``parameter`` is the
    prefix of ``<prefix>.weight`` and ``<prefix>.bias``; connections of one source with one prefix share the term.
    """

    source: str
    target: str
    role: Role
    operator: Operator = Operator.CONV
    kernel_size: int = 1
    stride: int = 1
    padding: int | None = None
    output_padding: int | None = None
    pool: Pool = Pool.NONE
    bias: bool = False
    parameter: str | None = None
    delay: int | None = None

    def __post_init__(self) -> None:
        if self.operator is not Operator.IDENTITY and self.parameter is None:
            object.__setattr__(self, "parameter", f"{self.target}.{self.role.value}")
        if self.padding is None:
            object.__setattr__(self, "padding", (self.kernel_size - 1) // 2)
        if self.output_padding is None:
            object.__setattr__(self, "output_padding", self.stride - 1 if self.operator is Operator.CONV_TRANSPOSE else 0)

    @property
    def geometry(self) -> Geometry:
        """The linear map, as the convolution op takes it."""
        assert self.padding is not None
        assert self.output_padding is not None
        return Geometry(self.operator, self.stride, self.padding, self.output_padding)

    @property
    def label(self) -> str:
        """A short name for plans and messages."""
        return f"{self.source} -> {self.target} ({self.role.value})"


@dataclass(frozen=True)
class Readout:
    """A linear readout of an area with a 1 x 1 map; log-probabilities are clamped: log(clamp(softmax(logits), 1e-10, 1))."""

    source: str
    num_classes: int
    bias: bool = True
    parameter: str = "readout"
    clamp: float = 1e-10


def pooled_shape(shape: Shape, pool: Pool) -> Shape:
    """The shape of a map after pooling."""
    channels, height, width = shape
    if pool is Pool.MAX:
        return channels, height // 2, width // 2
    if pool is Pool.MEAN:
        return channels, 1, 1
    return shape


@dataclass(frozen=True)
class Network:
    """A connection graph. ``areas`` are listed in the order in which a time step updates them.

    Raises ``ValueError`` naming what is wrong with the graph: unknown or repeated names, a connection without delay that reads an area
    updated later, shapes that disagree, an area without a bottom-up path.
    """

    name: str
    inputs: tuple[Input, ...]
    areas: tuple[Area, ...]
    connections: tuple[Connection, ...]
    unroll: Unroll = Unroll.ENGINEERING
    readout: Readout | None = None
    _json: str = field(init=False, default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        for attribute in ("inputs", "areas", "connections"):
            object.__setattr__(self, attribute, tuple(getattr(self, attribute)))
        self._check_names()
        self._check_order()
        for area in self.areas:
            self._check_connections_into(area)
        if self.readout is not None:
            if self.readout.source not in self.shapes:
                raise ValueError(f"readout: unknown area {self.readout.source!r}; areas are {[a.name for a in self.areas]}")
            if self.shapes[self.readout.source][1:] != (1, 1):
                raise ValueError(f"readout: area {self.readout.source!r} must have a 1 x 1 map, has {self.shapes[self.readout.source]}")
            if self.readout.num_classes < 1:
                raise ValueError(f"readout: expected num_classes >= 1, got {self.readout.num_classes}")
        # At once, not at first use: torch.compile can read an attribute, but not trace the encoder.
        object.__setattr__(self, "_json", json.dumps(_plain(self), separators=(",", ":")))

    def _check_names(self) -> None:
        names = [node.name for node in self.inputs] + [area.name for area in self.areas]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"network {self.name!r}: the name {name!r} is used more than once")
        for node in self.inputs:
            if min(node.channels, node.height, node.width) < 1:
                raise ValueError(f"input {node.name!r}: expected positive channels, height, width, got {node}")
        for area in self.areas:
            if area.channels < 1:
                raise ValueError(f"area {area.name!r}: expected channels >= 1, got {area.channels}")
        for c in self.connections:
            if c.source not in names:
                raise ValueError(f"connection {c.label}: unknown source {c.source!r}; there are {names}")
            if c.target not in [a.name for a in self.areas]:
                raise ValueError(f"connection {c.label}: unknown target {c.target!r}; areas are {[a.name for a in self.areas]}")
            if c.kernel_size < 1 or c.stride < 1:
                raise ValueError(f"connection {c.label}: expected kernel_size and stride >= 1, got {c.kernel_size} and {c.stride}")
            if c.operator is Operator.IDENTITY and c.bias:
                raise ValueError(f"connection {c.label}: the identity has no parameters, so expected bias=False")
            if c.delay not in (None, 0, 1):
                raise ValueError(f"connection {c.label}: expected delay 0, 1 or None, got {c.delay}")

    def delay(self, connection: Connection) -> int:
        """Time steps between a connection's source and its target."""
        if connection.delay is not None:
            return connection.delay
        if any(node.name == connection.source for node in self.inputs):
            return 0
        if self.unroll is Unroll.BIOLOGICAL:
            return 1
        return 0 if connection.role is Role.BOTTOM_UP else 1

    def _check_order(self) -> None:
        position = {node.name: -1 for node in self.inputs} | {area.name: i for i, area in enumerate(self.areas)}
        for c in self.connections:
            if self.delay(c) == 0 and position[c.source] >= position[c.target]:
                raise ValueError(
                    f"connection {c.label}: it has no delay, so {c.source!r} must stand before {c.target!r} in areas "
                    "(or give the connection delay=1)"
                )

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Channels, height and width of every input and area."""
        shapes: dict[str, Shape] = {node.name: (node.channels, node.height, node.width) for node in self.inputs}
        channels = {area.name: area.channels for area in self.areas}
        pending = list(self.areas)
        while pending:
            ready = [(area, c) for area in pending for c in self.connections if c.target == area.name and c.source in shapes]
            if not ready:
                raise ValueError(f"areas {[a.name for a in pending]} are not reached from any input")
            # Bottom-up first: it gives an area its size, the other terms must then fit.
            area, connection = min(ready, key=lambda pair: list(Role).index(pair[1].role))
            shapes[area.name] = (channels[area.name], *self.output_size(connection, shapes[connection.source]))
            pending.remove(area)
        return shapes

    @staticmethod
    def output_size(c: Connection, source: Shape) -> tuple[int, int]:
        """Height and width that a connection makes from a source's shape [C, H, W]."""
        _, *size = pooled_shape(source, c.pool)
        g = c.geometry
        if c.operator is Operator.CONV:
            size = [(n + 2 * g.padding - c.kernel_size) // g.stride + 1 for n in size]
        elif c.operator is Operator.CONV_TRANSPOSE:
            size = [(n - 1) * g.stride - 2 * g.padding + c.kernel_size + g.output_padding for n in size]
        elif c.operator is Operator.LINEAR and tuple(size) != (1, 1):
            raise ValueError(f"connection {c.label}: a linear map needs a 1 x 1 map (pool=Pool.MEAN?), got {size[0]} x {size[1]}")
        if min(size) < 1:
            raise ValueError(f"connection {c.label}: the source map {source} is too small, the result would be {size[0]} x {size[1]}")
        return size[0], size[1]

    def _check_connections_into(self, area: Area) -> None:
        incoming = [c for c in self.connections if c.target == area.name]
        if not any(c.role is Role.BOTTOM_UP for c in incoming):
            raise ValueError(f"area {area.name!r}: expected at least one bottom-up connection")
        for c in incoming:
            size = self.output_size(c, self.shapes[c.source])
            if size != self.shapes[area.name][1:]:
                raise ValueError(f"connection {c.label}: it makes a map of {size}, but the area has {self.shapes[area.name][1:]}")
            if c.operator is Operator.IDENTITY and self.shapes[c.source][0] != area.channels:
                raise ValueError(
                    f"connection {c.label}: the identity needs equal channels, got {self.shapes[c.source][0]} and {area.channels}"
                )

    def area(self, name: str) -> Area:
        """The area of that name; ``ValueError`` lists those there are."""
        for area in self.areas:
            if area.name == name:
                return area
        raise ValueError(f"unknown area {name!r}; areas are {[a.name for a in self.areas]}")

    def weight_shape(self, c: Connection) -> tuple[int, ...]:
        """Shape of a connection's weight (see :class:`Operator`); () for the identity."""
        source, target, k = self.shapes[c.source][0], self.shapes[c.target][0], c.kernel_size
        return {
            Operator.CONV: (target, source, k, k),
            Operator.CONV_TRANSPOSE: (source, target, k, k),
            Operator.LINEAR: (target, source),
            Operator.IDENTITY: (),
        }[c.operator]

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that a rollout takes, area by area: connections, then norm. (The readout has its own.)"""
        shapes: dict[str, tuple[int, ...]] = {}

        def add(name: str, shape: tuple[int, ...]) -> None:
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(f"parameter {name!r} is used with the shapes {shapes[name]} and {shape}")

        for area in self.areas:
            for c in self.connections:
                if c.target == area.name and c.operator is not Operator.IDENTITY:
                    add(f"{c.parameter}.weight", self.weight_shape(c))
                    if c.bias:
                        add(f"{c.parameter}.bias", (area.channels,))
            if area.norm is Norm.LAYER:
                add(f"{area.norm_parameter}.weight", self.norm_shape(area))
                add(f"{area.norm_parameter}.bias", self.norm_shape(area))
        return shapes

    def norm_shape(self, area: Area) -> tuple[int, ...]:
        """Shape of a norm's parameters: [C, H, W], or [C] where the area is a vector by construction (fed by means or linear maps)."""
        incoming = [c for c in self.connections if c.target == area.name]
        vector = all(c.pool is Pool.MEAN or c.operator is Operator.LINEAR for c in incoming)
        return (area.channels,) if vector else self.shapes[area.name]

    def to_json(self) -> str:
        """The network as JSON, for files and for the rollout op; :meth:`from_json` undoes it."""
        return self._json

    @staticmethod
    def from_json(text: str) -> Network:
        """Build a network from :meth:`to_json`'s text."""
        return _network_from_json(text)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.name.startswith("_")}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def _decode(cls: type, values: Mapping[str, Any], enums: Mapping[str, type[enum.Enum]]) -> Any:
    return cls(**{k: enums[k](v) if k in enums else v for k, v in values.items()})


@lru_cache(maxsize=256)
def _network_from_json(text: str) -> Network:
    data = json.loads(text)
    return Network(
        name=data["name"],
        inputs=tuple(Input(**v) for v in data["inputs"]),
        areas=tuple(_decode(Area, v, {"interaction": Interaction, "norm": Norm, "activation": Activation}) for v in data["areas"]),
        connections=tuple(_decode(Connection, v, {"role": Role, "operator": Operator, "pool": Pool}) for v in data["connections"]),
        unroll=Unroll(data["unroll"]),
        readout=Readout(**data["readout"]) if data["readout"] else None,
    )
