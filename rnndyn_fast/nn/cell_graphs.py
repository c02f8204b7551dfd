"""Layers of the task-driven ConvRNNs as areas and connections: a cell, and what stands before and after it.

Source: Nayebi et al., Neural Computation 34 (2022); cells as in :mod:`rnndyn_fast.ops.cells`. Parameters are named after the published
checkpoints' variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rnndyn_fast.graph.spec import SAME, ZERO, Activation, Area, Connection, Norm, Operator, Role
from rnndyn_fast.ops.cells import LSTM, UGRNN, Cell, Gain, GRUGates, GRUUpdate, IntersectionRNN, ReciprocalGated, TimeDecay

MEDIAN_TAU, MEDIAN_GATE = 0.9219348064291611, 0.7006566684988862
LN_EPS = 1e-12


@dataclass(frozen=True)
class Source:
    """A map that a cell reads: its node, its channels, and the delay."""

    name: str
    channels: int
    delay: int | None = 0


@dataclass
class Graph:
    """Areas and connections under construction."""

    areas: list[Area] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)

    def conv(self, source: Source, target: str, role: Role, kernel_size: int, parameter: str, **options: Any) -> None:
        """A convolution with SAME padding."""
        options = {"padding": SAME, **options}
        self.connections.append(
            Connection(source.name, target, role, Operator.CONV, kernel_size, parameter=parameter, delay=source.delay, **options)
        )

    def identity(self, source: Source, target: str, role: Role, **options: Any) -> None:
        """A map as it is."""
        self.connections.append(Connection(source.name, target, role, Operator.IDENTITY, delay=source.delay, **options))


@dataclass(frozen=True)
class CellSpec:
    """A cell of a layer: where it stands and what it reads.

    ``initial``: for each of its states what there is before the first step ("zero", or the name of an input).
    """

    name: str
    x: Source
    channels: int
    parameter: str
    residual: Source | None = None
    feedback: tuple[Source, ...] = ()
    initial: Mapping[str, str] = field(default_factory=dict)

    def before(self, *states: str) -> tuple[str, ...]:
        """What there is of some states before the first step."""
        return tuple(self.initial.get(state, ZERO) for state in states)


def _gates(graph: Graph, spec: CellSpec, kernel_size: int, target: str, parameter: str, h: Source, state: str | None = None) -> None:
    """One convolution of [x, h], as two connections that share its weight."""
    total = spec.x.channels + h.channels
    graph.conv(spec.x, target, Role.BOTTOM_UP, kernel_size, parameter, bias=True, concat=(0, total))
    graph.conv(h, target, Role.LATERAL, kernel_size, parameter, concat=(spec.x.channels, total), state=state)


def time_decay(graph: Graph, spec: CellSpec) -> None:
    """Time decay of x."""
    own = Source(spec.name, spec.channels, 1)
    graph.areas.append(Area(spec.name, spec.channels, cell=TimeDecay(), cell_parameter=spec.parameter, initial=spec.before("h")))
    graph.identity(spec.x, spec.name, Role.BOTTOM_UP)
    graph.identity(own, spec.name, Role.LATERAL, port="memory")


def simple_rnn(graph: Graph, spec: CellSpec, *, kernel_size: int = 3, layer_norm: bool = False) -> None:
    """h' = elu(LN?(Wi x + bi + Ws h + bs))."""
    norm = Norm.GROUP if layer_norm else Norm.NONE
    graph.areas.append(
        Area(spec.name, spec.channels, norm=norm, activation=Activation.ELU, norm_parameter=f"{spec.parameter}.layer_norm", eps=LN_EPS,
             initial=spec.before("h"))
    )  # fmt: skip
    graph.conv(spec.x, spec.name, Role.BOTTOM_UP, kernel_size, f"{spec.parameter}.i", bias=True)
    graph.conv(Source(spec.name, spec.channels, 1), spec.name, Role.LATERAL, kernel_size, f"{spec.parameter}.s", bias=True)


def gru(graph: Graph, spec: CellSpec, *, kernel_size: int = 3, forget_bias: float = 1.0, layer_norm: bool = False) -> None:
    """Two areas: reset and update gates, then candidate and update."""
    gates, h = f"{spec.name}.gates", Source(spec.name, spec.channels, 1)
    first = GRUGates(forget_bias=forget_bias, layer_norm=layer_norm)
    graph.areas += [
        Area(gates, spec.channels, cell=first, cell_parameter=spec.parameter),
        Area(spec.name, spec.channels, cell=GRUUpdate(layer_norm=layer_norm), cell_parameter=spec.parameter, initial=spec.before("h")),
    ]
    _gates(graph, spec, kernel_size, gates, f"{spec.parameter}.gates", h)
    graph.identity(h, gates, Role.LATERAL, port="memory")
    _gates(graph, spec, kernel_size, spec.name, f"{spec.parameter}.candidates", Source(gates, spec.channels, 0), "rh")
    graph.identity(Source(gates, spec.channels, 0), spec.name, Role.LATERAL, port="update", state="u")
    graph.identity(h, spec.name, Role.LATERAL, port="memory")


def _one_area(graph: Graph, spec: CellSpec, cell: Cell, kernel_size: int, h: str | None, memory: str | None) -> None:
    own = Source(spec.name, spec.channels, 1)
    graph.areas.append(
        Area(spec.name, spec.channels, cell=cell, cell_parameter=spec.parameter, initial=spec.before(*cell.states))
    )  # fmt: skip
    _gates(graph, spec, kernel_size, spec.name, f"{spec.parameter}.gates", own, h)
    graph.identity(own, spec.name, Role.LATERAL, port="memory", state=memory)


def lstm(
    graph: Graph, spec: CellSpec, *, kernel_size: int = 3, forget_bias: float = 1.0, layer_norm: bool = False, peepholes: bool = False
) -> None:
    """LSTM: output h, memory c."""
    _one_area(graph, spec, LSTM(forget_bias=forget_bias, layer_norm=layer_norm, peepholes=peepholes), kernel_size, None, "c")


def ugrnn(graph: Graph, spec: CellSpec, *, kernel_size: int = 3, forget_bias: float = 1.0) -> None:
    """UGRNN."""
    _one_area(graph, spec, UGRNN(forget_bias=forget_bias), kernel_size, None, None)


def intersection_rnn(graph: Graph, spec: CellSpec, *, kernel_size: int = 3, forget_bias: float = 1.0, layer_norm: bool = False) -> None:
    """IntersectionRNN; x needs as many channels as the cell."""
    _one_area(graph, spec, IntersectionRNN(forget_bias=forget_bias, layer_norm=layer_norm), kernel_size, "h", "h")
    graph.identity(spec.x, spec.name, Role.BOTTOM_UP, port="input")


def _halves(graph: Graph, spec: CellSpec, cell: ReciprocalGated, cell_channels: int) -> tuple[Source, Source]:
    c, o = Source(f"{spec.name}.c", cell_channels, 1), Source(spec.name, spec.channels, 1)
    for half, state in ((c, "c"), (o, "o")):
        graph.areas.append(Area(half.name, half.channels, cell=cell, initial=spec.before(state)))
        graph.identity(half, half.name, Role.LATERAL, port="memory")
    return c, o


def rgc_shallow(graph: Graph, spec: CellSpec, *, kernel_size: int = 3) -> None:
    """Reciprocal gated cell: halves c and o, dense gates, no biases; x enters o as it is, the layer's own input its gate."""
    c, o = _halves(graph, spec, ReciprocalGated(), spec.channels)
    own = f"{spec.parameter}."

    def gate(source: Source, target: Source, port: str, name: str) -> None:
        graph.conv(source, target.name, Role.LATERAL, kernel_size, own + name, port=port, cut_kernel=True)

    gate(c, c, "tau", "cell.tau")
    gate(o, c, "gate", "cell.gate")
    graph.conv(spec.x, c.name, Role.BOTTOM_UP, kernel_size, own + "cell.input_to_cell", cut_kernel=True)
    gate(o, o, "tau", "out.tau")
    gate(c, o, "gate", "out.gate")
    if spec.residual is not None:
        gate(spec.residual, o, "gate", "out.residual_to_out_gate")
    graph.identity(spec.x, o.name, Role.BOTTOM_UP)


def rgc_median(graph: Graph, spec: CellSpec, *, cell_channels: int = 64) -> None:
    """Reciprocal gated cell: separable 7 x 7 gates with biases; the layer's own input and the feedback enter the drive of o. x is elu of
    the convolution before."""
    cell = ReciprocalGated(Gain(MEDIAN_TAU, -MEDIAN_TAU), Gain(MEDIAN_GATE, -MEDIAN_GATE, Activation.TANH))
    c, o = _halves(graph, spec, cell, cell_channels)
    own = f"{spec.parameter}."

    def gate(source: Source, target: Source, port: str, name: str) -> None:
        separable = {"groups": source.channels, "middle_channels": source.channels, "bias": True, "cut_kernel": True}
        graph.conv(source, target.name, Role.LATERAL, 7, own + name, port=port, **separable)

    gate(c, c, "tau", "cell.tau")
    gate(o, c, "gate", "cell.out_to_cell")
    graph.conv(spec.x, c.name, Role.BOTTOM_UP, 2, own + "cell.input_to_cell", bias=True, cut_kernel=True)
    gate(o, o, "tau", "out.tau")
    gate(c, o, "gate", "out.gate")
    graph.conv(spec.x, o.name, Role.BOTTOM_UP, 3, own + "out.input_to_out", bias=True, cut_kernel=True)
    if spec.residual is not None:
        bypass(graph, spec.residual, o.name, spec.channels, own + "out.residual_add")
    first, total = 0, sum(f.channels for f in spec.feedback)
    for source in spec.feedback:
        options = {"resize": True, "concat": (first, total), "bias": first == 0}
        graph.conv(source, o.name, Role.TOP_DOWN, 1, own + "out.feedback_to_out", **options)
        first += source.channels


def bypass(graph: Graph, source: Source, target: str, channels: int, parameter: str) -> None:
    """A map added as it is or, where channels differ, through a 1 x 1 convolution without bias."""
    if source.channels == channels:
        graph.identity(source, target, Role.BOTTOM_UP)
    else:
        graph.conv(source, target, Role.BOTTOM_UP, 1, parameter)


CELLS: dict[str, tuple[Callable[..., None], str]] = {
    "timedecay": (time_decay, ""),
    "simplernn": (simple_rnn, "ConvNormBasicCell"),
    "gru": (gru, "ConvGRUCell"),
    "lstm": (lstm, "ConvLSTMCell"),
    "ugrnn": (ugrnn, "ConvUGRNNCell"),
    "intersectionrnn": (intersection_rnn, "ConvIntersectionRNNCell"),
    "rgc_shallow": (rgc_shallow, "ReciprocalGateCell"),
    "rgc_median": (rgc_median, "ReciprocalGateCell"),
}
STATES: dict[str, tuple[str, ...]] = {"lstm": ("c", "h"), "rgc_shallow": ("c", "o"), "rgc_median": ("c", "o")}


def cell_states(kind: str) -> tuple[str, ...]:
    """Names of a cell's states in the published order (they are concatenated along channels)."""
    return STATES.get(kind, ("h",))


def state_source(kind: str, name: str, state: str) -> tuple[str, str | None]:
    """Area, and map of it, that holds a state of the cell at area ``name``."""
    if state == "c" and kind.startswith("rgc"):
        return f"{name}.c", None
    return (name, state) if (kind, state) in (("lstm", "c"), ("intersectionrnn", "h")) else (name, None)


def add_cell(graph: Graph, kind: str, spec: CellSpec, **options: Any) -> None:
    """Add a cell to a graph, by its published name."""
    add, scope = CELLS[kind]
    prefix = ".".join(part for part in (spec.parameter, scope) if part) or spec.name
    add(graph, replace(spec, parameter=prefix), **options)


def sequence(sources: Sequence[Source]) -> list[Source]:
    """Feedback sources in the published order: sorted as strings."""
    return sorted(sources, key=lambda s: s.name)
