"""Graphs under construction: the areas and connections of cells and layers, with TensorFlow's SAME padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rnndyn_fast.graph.spec.network import SAME, ZERO, Area, Connection, Operator, Role

LN_EPS = 1e-12  # of the published layer norms


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

    def conv(self, source: Source, target: str, role: Role, kernel_size: int | tuple[int, int], parameter: str, **options: Any) -> None:
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


def bypass(graph: Graph, source: Source, target: str, channels: int, parameter: str) -> None:
    """A map added as it is or, where channels differ, through a 1 x 1 convolution without bias."""
    if source.channels == channels:
        graph.identity(source, target, Role.BOTTOM_UP)
    else:
        graph.conv(source, target, Role.BOTTOM_UP, 1, parameter)
