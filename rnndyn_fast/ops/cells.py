"""Cells: update rules of areas with gates.

A cell has *ports*, each the sum of the connections that enter it, and *states*, the maps it makes in one step from its ports; the first
state is the area's output. Everything in a cell is pointwise, but for its norms: what convolves is a connection. A state of the step
before enters through a port like anything else (an identity connection with a delay). An absent port counts as zero, but the first one:
without it the area has no state.

``D`` are the area's channels, ``s`` is the logistic sigmoid, ``.`` a product of maps; ``LN`` is a group norm with one group per gate
(statistics over H, W and the gate's channels, affine per channel).

Sources: Nayebi et al., "Task-driven convolutional recurrent models of the visual system" (NeurIPS 2018), "Recurrent connections in the
primate ventral visual stream mediate a trade-off between task performance and network size during core object recognition" (Neural
Computation 34, 2022); GRU: Cho et al. 2014; LSTM: Hochreiter & Schmidhuber 1997; UGRNN and IntersectionRNN: Collins et al. 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rnndyn_fast.ops.activations import Activation


@dataclass(frozen=True)
class Cell:
    """Base of the rules below.

    Attributes
    ----------
    kind: its name in JSON.
    ports: for each port the multiple of D that its channels are.
    states: names of the maps it makes.
    """

    kind: ClassVar[str]
    ports: ClassVar[dict[str, int]]
    states: ClassVar[tuple[str, ...]]

    @property
    def constants(self) -> dict[str, float]:
        """Constants that are added to ports, by name."""
        return {}

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Its own parameters, by name."""
        return {}

    def check(self, area: str) -> None:
        """Raise ``ValueError`` naming a field that makes no sense."""


def _norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


@dataclass(frozen=True)
class TimeDecay(Cell):
    """``h' = m h + drive``, with one learned scalar m (parameter ``memory_decay`` [1])."""

    kind: ClassVar[str] = "time_decay"
    ports: ClassVar[dict[str, int]] = {"drive": 1, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("h",)

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return {"memory_decay": (1,)}


@dataclass(frozen=True)
class GRUGates(Cell):
    """First half of a GRU: ``r, u = split(LN?(gates)); rh = s(r + forget_bias) . memory; u = s(u)``."""

    kind: ClassVar[str] = "gru_gates"
    ports: ClassVar[dict[str, int]] = {"gates": 2, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("rh", "u")
    forget_bias: float = 1.0
    layer_norm: bool = False
    eps: float = 1e-12

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return _norm_shapes("gates_norm", 2 * channels) if self.layer_norm else {}


@dataclass(frozen=True)
class GRUUpdate(Cell):
    """Second half of a GRU: ``h' = update . memory + (1 - update) . activation(LN?(candidate))``."""

    kind: ClassVar[str] = "gru_update"
    ports: ClassVar[dict[str, int]] = {"candidate": 1, "update": 1, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("h",)
    layer_norm: bool = False
    eps: float = 1e-12
    activation: Activation = Activation.TANH

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation(self.activation))

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return _norm_shapes("candidate_norm", channels) if self.layer_norm else {}


@dataclass(frozen=True)
class LSTM(Cell):
    """LSTM; all peepholes p_f, p_i, p_o look at the old c (``memory``), and with ``layer_norm`` the normalised c' is what is stored::

        i, j, f, g = split(LN?(gates))
        c' = LN?(memory . s(f + forget_bias + p_f . memory) + s(i + p_i . memory) . activation(j))
        h' = activation(c') . s(g + p_o . memory)

    Parameters: ``gates_norm`` [4D], ``state_norm`` [D], ``peepholes`` [3, D, H, W] in the order f, i, o.
    """

    kind: ClassVar[str] = "lstm"
    ports: ClassVar[dict[str, int]] = {"gates": 4, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("h", "c")
    forget_bias: float = 1.0
    layer_norm: bool = False
    peepholes: bool = False
    eps: float = 1e-12
    activation: Activation = Activation.TANH

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation(self.activation))

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.layer_norm:
            shapes |= _norm_shapes("gates_norm", 4 * channels) | _norm_shapes("state_norm", channels)
        if self.peepholes:
            shapes["peepholes"] = (3, channels, height, width)
        return shapes


@dataclass(frozen=True)
class UGRNN(Cell):
    """``g, q = split(gates); g = s(g + forget_bias); h' = g . memory + (1 - g) . tanh(q)``."""

    kind: ClassVar[str] = "ugrnn"
    ports: ClassVar[dict[str, int]] = {"gates": 2, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("h",)
    forget_bias: float = 1.0


@dataclass(frozen=True)
class IntersectionRNN(Cell):
    """Gated through time and through depth; its output z is not its memory h::

    gh, q, gy, y = split(LN?(gates)); gh = s(gh + forget_bias); gy = s(gy + forget_bias)
    h' = gh . memory + (1 - gh) . tanh(q);  z = gy . input + (1 - gy) . relu(y)
    """

    kind: ClassVar[str] = "intersection_rnn"
    ports: ClassVar[dict[str, int]] = {"gates": 4, "input": 1, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("z", "h")
    forget_bias: float = 1.0
    layer_norm: bool = False
    eps: float = 1e-12

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        return _norm_shapes("gates_norm", 4 * channels) if self.layer_norm else {}


@dataclass(frozen=True)
class Gain:
    """A factor ``offset + multiplier * nonlinearity(x + bias)``."""

    offset: float = 1.0
    multiplier: float = -1.0
    nonlinearity: Activation = Activation.SIGMOID
    bias: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "nonlinearity", Activation(self.nonlinearity))


@dataclass(frozen=True)
class ReciprocalGated(Cell):
    """One of the two halves (cell, output) of a reciprocal gated cell, each an area::

        h' = activation(tau_gain(tau) . memory + gate_gain(gate) . (drive + drive_bias))

    ``tau`` is computed from the half's own state, ``gate`` from the other's, both of the step before.
    """

    kind: ClassVar[str] = "reciprocal_gated"
    ports: ClassVar[dict[str, int]] = {"drive": 1, "tau": 1, "gate": 1, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("h",)
    tau_gain: Gain = Gain()
    gate_gain: Gain = Gain()
    activation: Activation = Activation.ELU
    drive_bias: float = 0.0

    @property
    def constants(self) -> dict[str, float]:
        named = {"drive": self.drive_bias, "tau": self.tau_gain.bias, "gate": self.gate_gain.bias}
        return {name: value for name, value in named.items() if value}

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation(self.activation))
        for name in ("tau_gain", "gate_gain"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, Gain(**value))


@dataclass(frozen=True)
class Intervention(Cell):
    """A state as an experiment leaves it: ``input`` or, in chosen units, what the ``rule`` says: "clamp" to a value, "scale" by one,
    "freeze" (``memory``, the state of the step before), "noise" of a standard deviation, "function".

    Parameters [D, H, W]: ``value`` (the value, factor, or standard deviation) and, where ``masked``, ``units`` (1 in the chosen units, else
    0). ``step``, ``seed``: of noise and functions; ``function``: which one it is (:mod:`rnndyn_fast.reference.interventions`).
    """

    kind: ClassVar[str] = "intervention"
    ports: ClassVar[dict[str, int]] = {"input": 1, "memory": 1}
    states: ClassVar[tuple[str, ...]] = ("h",)
    rule: str = "clamp"
    masked: bool = False
    step: int = 0
    seed: int = 0
    function: int = 0

    def parameter_shapes(self, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        names = [*(["value"] if self.rule in ("clamp", "scale", "noise") else []), *(["units"] if self.masked else [])]
        return dict.fromkeys(names, (channels, height, width))

    @property
    def by_sample(self) -> bool:
        """Whether a sample's place in the batch matters, or all samples are wanted at once."""
        return self.rule in ("noise", "function")


CELLS: dict[str, type[Cell]] = {
    c.kind: c for c in (TimeDecay, GRUGates, GRUUpdate, LSTM, UGRNN, IntersectionRNN, ReciprocalGated, Intervention)
}


def cell_from_plain(values: Mapping[str, Any]) -> Cell:
    """A cell from its JSON object: its ``kind`` and its fields. ``ValueError`` for an unknown kind or field."""
    options = dict(values)
    kind = options.pop("kind", None)
    if kind not in CELLS:
        raise ValueError(f"cell: unknown kind {kind!r}; there are {sorted(CELLS)}")
    known = {f.name for f in dataclasses.fields(CELLS[kind])}
    for name in options:
        if name not in known:
            raise ValueError(f"cell {kind}: unknown field {name!r}; fields are {sorted(known)}")
    return CELLS[kind](**options)
