"""What a recurrent convolutional network is, as data: inputs, areas, connections, and the order in which time unrolls.

A network is a directed graph. Each *area* holds one map [C, H, W] per time step. Each *connection* applies a linear map (or the
identity) to the map of its source and feeds its target. One area at one time step computes::

    drive      = sum over bottom-up connections (multiplicative), or over all connections (additive)
    modulator  = 1 + sum over lateral and top-down connections                       (multiplicative only)
    value      = drive * modulator
    state      = activation(norm(value))

A connection whose source has no state yet is left out (at the first time step there is no lateral and no top-down term); an area none of
whose drive terms is there yet has no state itself. Absent is not zero: a bias is added only with the term it belongs to. (An area may be
declared zero, or given by an input, before its first state: :class:`~rnndyn_fast.graph.spec.areas.Area`.)

An area may have a gated *cell* as its update rule instead (:mod:`rnndyn_fast.ops.cells`): then connections enter its ports. Whatever
else a layer has (a convolution before or after the cell, a bypass, pooling) is a further area, connected without delay. An area of several
streams is listed as several, one per stream, which share parameters by name.

Source: Thorat, Doerig & Kietzmann, "Characterising representation dynamics in recurrent neural networks for object recognition",
arXiv 2308.12435.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from rnndyn_fast.graph.spec.areas import ABSENT, ZERO, Area, Input, Interaction, Norm
from rnndyn_fast.graph.spec.connections import FIT, SAME, Connection, Pool, Role, Shape, Window, pooled_shape
from rnndyn_fast.graph.spec.json_values import from_plain, to_plain
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.engines import Operator

__all__ = [
    "ABSENT", "FIT", "SAME", "ZERO", "Activation", "Area", "Connection", "Input", "Interaction", "Network", "Norm", "Operator", "Pool",
    "Readout", "Role", "Shape", "Unroll", "Window", "pooled_shape",
]  # fmt: skip


class Unroll(enum.Enum):
    """Which time step a connection reads.

    ENGINEERING: bottom-up connections read the same step, lateral and top-down ones the step before. BIOLOGICAL: every connection
    between areas takes one step; only inputs are seen at once.
    """

    ENGINEERING = "engineering"
    BIOLOGICAL = "biological"


@dataclass(frozen=True)
class Readout:
    """Class probabilities from an area with a 1 x 1 map: a linear map, or with ``parameter=None`` its first ``num_classes`` channels.

    Log-probabilities are clamped, log(clamp(softmax(logits), clamp, 1)); with ``clamp=None`` they are the log-softmax itself.
    ``cumulative``: the logits of all steps so far are summed. ``first_step``: time steps before it give no probabilities.
    """

    source: str
    num_classes: int
    bias: bool = True
    parameter: str | None = "readout"
    clamp: float | None = 1e-10
    cumulative: bool = False
    first_step: int = 0


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
        self._check_initial()
        self._check_readout()
        # At once, not at first use: torch.compile can read an attribute, but not trace the encoder.
        object.__setattr__(self, "_json", json.dumps(to_plain(self), separators=(",", ":")))

    # (By its text: schedules are looked up by network, several times in every rollout.)
    def __eq__(self, other: object) -> bool:
        return self._json == other._json if isinstance(other, Network) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._json)

    # ---------------------------------------------------------------- checks

    def _check_names(self) -> None:
        names = [node.name for node in self.inputs] + [area.name for area in self.areas]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"network {self.name!r}: the name {name!r} is used more than once")
            if name in (ABSENT, ZERO) or ":" in name:
                raise ValueError(f"network {self.name!r}: the name {name!r} has a meaning of its own")
        for node in self.inputs:
            if min(node.channels, node.height, node.width) < 1:
                raise ValueError(f"input {node.name!r}: expected positive channels, height, width, got {node}")
            if node.off_at is not None and (node.frames or node.off_at < 1):
                raise ValueError(f"input {node.name!r}: off_at: expected a time step >= 1 of an input without frames, got {node.off_at}")
        for area in self.areas:
            area.check()
            if area.like is not None and (area.like == area.name or area.like not in names):
                raise ValueError(f"area {area.name!r}: like: expected another of {names}, got {area.like!r}")
        for c in self.connections:
            if c.source not in names:
                raise ValueError(f"connection {c.label}: unknown source {c.source!r}; there are {names}")
            if c.target not in [a.name for a in self.areas]:
                raise ValueError(f"connection {c.label}: unknown target {c.target!r}; areas are {[a.name for a in self.areas]}")
            c.check()
            states = self._areas[c.source].states if c.source in self._areas else (None,)
            if c.state is not None and c.state not in states:
                raise ValueError(f"connection {c.label}: unknown state {c.state!r} of {c.source!r}; there are {list(states)}")
            ports = self._areas[c.target].ports
            if c.port is not None and c.port not in ports:
                raise ValueError(f"connection {c.label}: unknown port {c.port!r} of {c.target!r}; there are {list(ports)}")

    @cached_property
    def _areas(self) -> dict[str, Area]:
        return {area.name: area for area in self.areas}

    def _check_order(self) -> None:
        position = {node.name: -1 for node in self.inputs} | {area.name: i for i, area in enumerate(self.areas)}
        for c in self.connections:
            if self.delay(c) == 0 and position[c.source] >= position[c.target]:
                raise ValueError(
                    f"connection {c.label}: it has no delay, so {c.source!r} must stand before {c.target!r} in areas "
                    "(or give the connection delay=1)"
                )

    def _check_connections_into(self, area: Area) -> None:
        incoming = [c for c in self.connections if c.target == area.name]
        if area.cell is None:
            if not any(c.role is Role.BOTTOM_UP for c in incoming):
                raise ValueError(f"area {area.name!r}: expected at least one bottom-up connection")
        elif not any(self.port(c) == next(iter(area.ports)) for c in incoming):
            raise ValueError(f"area {area.name!r}: expected at least one connection into port {next(iter(area.ports))!r} of its cell")
        for c in incoming:
            self._check_channels(c)
            size = self.shapes[area.name][1:]
            if c.output_padding == FIT:
                pooled = pooled_shape(self.shapes[c.source], c.pool)
                c.window((pooled[1], pooled[2]), (size[0], size[1]))
            elif c.resize:
                if c.operator is not Operator.IDENTITY and (c.stride, c.window(size).kernel) != (1, (1, 1)) and c.padding != SAME:
                    made = c.output_size((self.shapes[c.source][0], *size))
                    if made != size:
                        raise ValueError(f"connection {c.label}: after resizing it makes a map of {made}, but the area has {size}")
            elif (made := c.output_size(self.shapes[c.source])) != size:
                raise ValueError(f"connection {c.label}: it makes a map of {made}, but the area has {size}")

    def _check_channels(self, c: Connection) -> None:
        source, target = self.shapes[c.source][0], self.target_channels(c)
        if c.operator is Operator.IDENTITY and source != target:
            port = f" (port {self.port(c)!r})" if self.area(c.target).cell is not None else ""
            raise ValueError(f"connection {c.label}: the identity needs equal channels, got {source} and {target}{port}")
        made = target if c.middle_channels is None else c.middle_channels
        if c.groups > 1 and (source % c.groups or made % c.groups):
            raise ValueError(f"connection {c.label}: expected groups that divide {source} and {made} channels, got {c.groups}")
        if c.concat is not None:
            first, total = c.concat
            if first < 0 or first + source > total:
                raise ValueError(f"connection {c.label}: concat: channels {first} .. {first + source} are not within {total}")

    def _check_initial(self) -> None:
        inputs = {node.name: node for node in self.inputs}
        for area in self.areas:
            for state in area.states:
                name = area.initial_of(state)
                if name in (ABSENT, ZERO):
                    continue
                if name not in inputs:
                    raise ValueError(
                        f'area {area.name!r}: initial: expected "absent", "zero" or one of the inputs {list(inputs)}, got {name!r}'
                    )
                if self.shapes[name] != self.shapes[area.name] or inputs[name].frames:
                    raise ValueError(
                        f"area {area.name!r}: initial: input {name!r} must be one map of {self.shapes[area.name]}, has {self.shapes[name]}"
                    )

    def _check_readout(self) -> None:
        if self.readout is None:
            return
        if self.readout.source not in self.shapes:
            raise ValueError(f"readout: unknown area {self.readout.source!r}; areas are {[a.name for a in self.areas]}")
        if self.shapes[self.readout.source][1:] != (1, 1):
            raise ValueError(f"readout: area {self.readout.source!r} must have a 1 x 1 map, has {self.shapes[self.readout.source]}")
        if self.readout.num_classes < 1:
            raise ValueError(f"readout: expected num_classes >= 1, got {self.readout.num_classes}")
        if self.readout.parameter is None and self.readout.num_classes > self.shapes[self.readout.source][0]:
            raise ValueError(
                f"readout: expected num_classes of at most the {self.shapes[self.readout.source][0]} channels of {self.readout.source!r}, "
                f"got {self.readout.num_classes}"
            )

    # ---------------------------------------------------------------- what follows from the graph

    def delay(self, connection: Connection) -> int:
        """Time steps between a connection's source and its target."""
        if connection.delay is not None:
            return connection.delay
        if any(node.name == connection.source for node in self.inputs):
            return 0
        if self.unroll is Unroll.BIOLOGICAL:
            return 1
        return 0 if connection.role is Role.BOTTOM_UP else 1

    def port(self, c: Connection) -> str:
        """The port of its target that a connection enters."""
        if c.port is not None:
            return c.port
        area = self._areas[c.target]
        if area.cell is not None:
            return next(iter(area.ports))
        return "drive" if area.interaction is Interaction.ADDITIVE or c.role is Role.BOTTOM_UP else "modulator"

    def target_channels(self, c: Connection) -> int:
        """Channels of the term that a connection makes."""
        return self._areas[c.target].ports[self.port(c)]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Channels, height and width of every input and area."""
        shapes: dict[str, Shape] = {node.name: (node.channels, node.height, node.width) for node in self.inputs}
        pending = list(self.areas)
        while pending:
            alike = next((a for a in pending if a.like in shapes), None)
            if alike is not None:
                shapes[alike.name] = (alike.channels, *shapes[str(alike.like)][1:])
                pending.remove(alike)
                continue
            ready = [
                (area, c) for area in pending for c in self.connections if c.target == area.name and c.source in shapes and c.sizes_target
            ]
            if not ready:
                raise ValueError(f"areas {[a.name for a in pending]} are not reached from any input")
            # Bottom-up first: it gives an area its size, the other terms must then fit.
            area, connection = min(ready, key=lambda pair: list(Role).index(pair[1].role))
            shapes[area.name] = (area.channels, *connection.output_size(shapes[connection.source]))
            pending.remove(area)
        return shapes

    def read_size(self, c: Connection) -> tuple[int, int]:
        """Height and width of the map that a connection's linear map reads: after pooling and resizing."""
        _, height, width = self.shapes[c.target] if c.resize else pooled_shape(self.shapes[c.source], c.pool)
        return height, width

    def window(self, c: Connection) -> Window:
        """How a connection's kernel lies on the map it reads."""
        _, height, width = self.shapes[c.target]
        return c.window(self.read_size(c), (height, width))

    def term_shape(self, c: Connection) -> Shape:
        """Channels, height and width of a connection's term."""
        return (self.target_channels(c), *self.shapes[c.target][1:])

    def area(self, name: str) -> Area:
        """The area of that name; ``ValueError`` lists those there are."""
        if name not in self._areas:
            raise ValueError(f"unknown area {name!r}; areas are {list(self._areas)}")
        return self._areas[name]

    def recorded(self, name: str) -> tuple[str, str | None]:
        """Area and state that a name in ``record`` means: "area", its output, or "area:state"."""
        area, _, state = name.partition(":")
        if area not in self._areas:
            raise ValueError(f"record: unknown area {area!r}; areas are {list(self._areas)}")
        states = self._areas[area].states
        if state and state not in states:
            raise ValueError(f"record: area {area!r} has no state {state!r}; it has {[s for s in states if s]}")
        return area, state or None

    def weight_shapes(self, c: Connection) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a connection's weights (see :class:`Operator`); none for the identity."""
        if c.operator is Operator.IDENTITY:
            return {}
        source, target = self.shapes[c.source][0], self.target_channels(c)
        if c.concat is not None:
            source = c.concat[1]
        if c.operator is Operator.LINEAR:
            return {c.weights[0]: (target, source)}
        kernel = self.window(c).kernel
        if c.operator is Operator.CONV_TRANSPOSE:
            return {c.weights[0]: (source, target, *kernel)}
        first = (target if c.middle_channels is None else c.middle_channels, source // c.groups, *kernel)
        if c.middle_channels is None:
            return {c.weights[0]: first}
        return {c.weights[0]: first, c.weights[1]: (target, c.middle_channels, 1, 1)}

    def weight_shape(self, c: Connection) -> tuple[int, ...]:
        """Shape of a connection's (first) weight; () for the identity."""
        return next(iter(self.weight_shapes(c).values()), ())

    def multiply_adds(self, c: Connection) -> int:
        """Multiplications that a connection's term takes, per sample and evaluation."""
        _, height, width = self.term_shape(c)
        total = 0
        for shape in self.weight_shapes(c).values():
            products = 1
            for n in shape:
                products *= n
            if c.concat is not None:
                products = products // c.concat[1] * self.shapes[c.source][0]
            size = self.read_size(c) if c.operator is Operator.CONV_TRANSPOSE else (height, width)
            total += products * size[0] * size[1]
        return total

    @cached_property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters that a rollout takes, area by area: connections, norm, cell. (The readout has its own.)"""
        shapes: dict[str, tuple[int, ...]] = {}

        def add(name: str, shape: tuple[int, ...]) -> None:
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(f"parameter {name!r} is used with the shapes {shapes[name]} and {shape}")

        for area in self.areas:
            for c in self.connections:
                if c.target == area.name:
                    weights = self.weight_shapes(c)
                    for name, shape in weights.items():
                        add(name, shape)
                        bias = name.removesuffix("weight") + "bias"
                        if bias in c.biases:
                            add(bias, (shape[0] if c.operator is not Operator.CONV_TRANSPOSE else shape[1],))
            for prefix in self.norm_prefixes(area):
                add(f"{prefix}.weight", self.norm_shape(area))
                add(f"{prefix}.bias", self.norm_shape(area))
                if area.norm is Norm.BATCH and area.norm_frozen:
                    add(f"{prefix}.running_mean", (area.channels,))
                    add(f"{prefix}.running_var", (area.channels,))
            if area.cell is not None:
                for name, shape in area.cell.parameter_shapes(*self.shapes[area.name]).items():
                    add(f"{area.cell_parameter}.{name}", shape)
        return shapes

    @cached_property
    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the running statistics of its batch norms that are not frozen."""
        kinds = ("running_mean", "running_var")
        prefixes = [(p, a.channels) for a in self.areas if a.norm is Norm.BATCH and not a.norm_frozen for p in self.norm_prefixes(a)]
        return {f"{prefix}.{kind}": (channels,) for prefix, channels in prefixes for kind in kinds}

    def norm_prefixes(self, area: Area) -> list[str]:
        """Prefixes of an area's norm parameters: none, one, or one per time step."""
        if area.norm is Norm.NONE:
            return []
        if area.norm is Norm.BATCH:
            assert area.norm_steps is not None
            return [f"{area.norm_parameter}.{t}" for t in range(area.norm_steps)]
        assert area.norm_parameter is not None
        return [area.norm_parameter]

    def norm_shape(self, area: Area) -> tuple[int, ...]:
        """Shape of a norm's parameters: [C]; LAYER: [C, H, W], or [C] where the area is a vector by construction (fed by means or linear
        maps)."""
        incoming = [c for c in self.connections if c.target == area.name]
        vector = all(c.pool is Pool.MEAN or c.operator is Operator.LINEAR for c in incoming)
        return (area.channels,) if vector or area.norm is not Norm.LAYER else self.shapes[area.name]

    def to_json(self) -> str:
        """The network as JSON, for files and for the rollout op; :meth:`from_json` undoes it."""
        return self._json

    @staticmethod
    def from_json(text: str) -> Network:
        """Build a network from :meth:`to_json`'s text."""
        return _network_from_json(text)


@lru_cache(maxsize=256)
def _network_from_json(text: str) -> Network:
    data = json.loads(text)
    return Network(
        name=data["name"],
        inputs=tuple(from_plain(Input, v) for v in data["inputs"]),
        areas=tuple(from_plain(Area, v) for v in data["areas"]),
        connections=tuple(from_plain(Connection, v) for v in data["connections"]),
        unroll=Unroll(data["unroll"]),
        readout=from_plain(Readout, data["readout"]) if data["readout"] else None,
    )
