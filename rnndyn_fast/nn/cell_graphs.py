"""Layers of the task-driven ConvRNNs as areas and connections: a cell, and what stands before and after it.

Source: Nayebi et al., Neural Computation 34 (2022); cells as in :mod:`rnndyn_fast.ops.cells`. Parameters are named after the published
checkpoints' variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rnndyn_fast.graph.spec.network import Activation, Area, Norm, Role
from rnndyn_fast.nn.graph_builder import LN_EPS, CellSpec, Graph, Source
from rnndyn_fast.nn.reciprocal import reciprocal_gated
from rnndyn_fast.nn.reciprocal_options import KernelSize, reciprocal_options
from rnndyn_fast.ops.cells import LSTM, UGRNN, Cell, GRUGates, GRUUpdate, IntersectionRNN, TimeDecay


def _gates(graph: Graph, spec: CellSpec, kernel_size: KernelSize, target: str, parameter: str, h: Source, state: str | None = None) -> None:
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


def simple_rnn(
    graph: Graph,
    spec: CellSpec,
    *,
    kernel_size: KernelSize = 3,
    layer_norm: bool = False,
    activation: Activation | str = Activation.ELU,
) -> None:
    """h' = activation(LN?(Wi x + bi + Ws h + bs))."""
    norm = Norm.GROUP if layer_norm else Norm.NONE
    graph.areas.append(
        Area(spec.name, spec.channels, norm=norm, activation=Activation(activation), norm_parameter=f"{spec.parameter}.layer_norm",
             eps=LN_EPS, initial=spec.before("h"))
    )  # fmt: skip
    graph.conv(spec.x, spec.name, Role.BOTTOM_UP, kernel_size, f"{spec.parameter}.i", bias=True)
    graph.conv(Source(spec.name, spec.channels, 1), spec.name, Role.LATERAL, kernel_size, f"{spec.parameter}.s", bias=True)


def gru(
    graph: Graph,
    spec: CellSpec,
    *,
    kernel_size: KernelSize = 3,
    forget_bias: float = 1.0,
    layer_norm: bool = False,
    activation: Activation | str = Activation.TANH,
) -> None:
    """Two areas: reset and update gates, then candidate and update."""
    gates, h = f"{spec.name}.gates", Source(spec.name, spec.channels, 1)
    first = GRUGates(forget_bias=forget_bias, layer_norm=layer_norm)
    second = GRUUpdate(layer_norm=layer_norm, activation=Activation(activation))
    graph.areas += [
        Area(gates, spec.channels, cell=first, cell_parameter=spec.parameter),
        Area(spec.name, spec.channels, cell=second, cell_parameter=spec.parameter, initial=spec.before("h")),
    ]
    _gates(graph, spec, kernel_size, gates, f"{spec.parameter}.gates", h)
    graph.identity(h, gates, Role.LATERAL, port="memory")
    _gates(graph, spec, kernel_size, spec.name, f"{spec.parameter}.candidates", Source(gates, spec.channels, 0), "rh")
    graph.identity(Source(gates, spec.channels, 0), spec.name, Role.LATERAL, port="update", state="u")
    graph.identity(h, spec.name, Role.LATERAL, port="memory")


def _one_area(graph: Graph, spec: CellSpec, cell: Cell, kernel_size: KernelSize, h: str | None, memory: str | None) -> None:
    own = Source(spec.name, spec.channels, 1)
    graph.areas.append(
        Area(spec.name, spec.channels, cell=cell, cell_parameter=spec.parameter, initial=spec.before(*cell.states))
    )  # fmt: skip
    _gates(graph, spec, kernel_size, spec.name, f"{spec.parameter}.gates", own, h)
    graph.identity(own, spec.name, Role.LATERAL, port="memory", state=memory)


def lstm(
    graph: Graph,
    spec: CellSpec,
    *,
    kernel_size: KernelSize = 3,
    forget_bias: float = 1.0,
    layer_norm: bool = False,
    peepholes: bool = False,
    activation: Activation | str = Activation.TANH,
) -> None:
    """LSTM: output h, memory c."""
    cell = LSTM(forget_bias=forget_bias, layer_norm=layer_norm, peepholes=peepholes, activation=Activation(activation))
    _one_area(graph, spec, cell, kernel_size, None, "c")


def ugrnn(graph: Graph, spec: CellSpec, *, kernel_size: KernelSize = 3, forget_bias: float = 1.0) -> None:
    """UGRNN."""
    _one_area(graph, spec, UGRNN(forget_bias=forget_bias), kernel_size, None, None)


def intersection_rnn(
    graph: Graph, spec: CellSpec, *, kernel_size: KernelSize = 3, forget_bias: float = 1.0, layer_norm: bool = False
) -> None:
    """IntersectionRNN; x needs as many channels as the cell."""
    _one_area(graph, spec, IntersectionRNN(forget_bias=forget_bias, layer_norm=layer_norm), kernel_size, "h", "h")
    graph.identity(spec.x, spec.name, Role.BOTTOM_UP, port="input")


RECIPROCAL = "rgc"
CELLS: dict[str, tuple[Callable[..., None], str]] = {
    "timedecay": (time_decay, ""),
    "simplernn": (simple_rnn, "ConvNormBasicCell"),
    "gru": (gru, "ConvGRUCell"),
    "lstm": (lstm, "ConvLSTMCell"),
    "ugrnn": (ugrnn, "ConvUGRNNCell"),
    "intersectionrnn": (intersection_rnn, "ConvIntersectionRNNCell"),
    RECIPROCAL: (reciprocal_gated, "ReciprocalGateCell"),
}
PRESETS = {"rgc_shallow": "shallow", "rgc_median": "median"}  # names of the reciprocal gated cell's forms
KINDS = (*CELLS, *PRESETS)


def resolved(kind: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The cell and the options that a kind, which may be a preset, stands for.

    Raises: ``ValueError``: an option of the reciprocal gated cell that it has not, or that excludes another one.
    """
    given = dict(options)
    if kind in PRESETS:
        if "form" in given:
            raise ValueError(f"form: {kind} is the {PRESETS[kind]} form already; give it with 'rgc', got {given['form']!r}")
        kind, given = RECIPROCAL, {**given, "form": PRESETS[kind]}
    if kind == RECIPROCAL:
        reciprocal_options(given)
    return kind, given


def cell_states(kind: str, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Names of a cell's states in the published order (they are concatenated along channels)."""
    kind, given = resolved(kind, options or {})
    if kind == RECIPROCAL:
        return reciprocal_options(given).states
    return ("c", "h") if kind == "lstm" else ("h",)


def state_source(kind: str, name: str, state: str) -> tuple[str, str | None]:
    """Area, and map of it, that holds a state of the cell at area ``name``."""
    if state == "c" and kind.startswith(RECIPROCAL):
        return f"{name}.c", None
    return (name, state) if (kind, state) in (("lstm", "c"), ("intersectionrnn", "h")) else (name, None)


def add_cell(graph: Graph, kind: str, spec: CellSpec, **options: Any) -> None:
    """Add a cell to a graph, by its published name."""
    kind, options = resolved(kind, options)
    add, scope = CELLS[kind]
    prefix = ".".join(part for part in (spec.parameter, scope) if part) or spec.name
    add(graph, replace(spec, parameter=prefix), **options)


def sequence(sources: Sequence[Source]) -> list[Source]:
    """Feedback sources in the published order: sorted as strings."""
    return sorted(sources, key=lambda s: s.name)
