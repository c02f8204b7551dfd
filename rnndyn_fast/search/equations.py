"""A network as equations, in HTML: one line per map and per port of a cell, and what every letter means."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from rnndyn_fast.graph.spec.network import Activation, Area, Connection, Interaction, Network, Norm, Operator, Pool
from rnndyn_fast.ops.cells import LSTM, UGRNN, Gain, GRUGates, GRUUpdate, IntersectionRNN, ReciprocalGated, TimeDecay

MINUS, DOT, STAR = "\u2212", "\u2299", "\u2217"
_FUNCTIONS = {
    "relu": "relu(x) = max(x, 0)",
    "elu": "elu(x) = x for x > 0, else e\u02e3 \u2212 1",
    "tanh": "hyperbolic tangent",
    "\u03c3": "logistic function, \u03c3(x) = 1 / (1 + e\u207b\u02e3)",
    "LN": "layer norm: mean 0 and variance 1 over channels and map, then a learned gain and offset for each element",
    "GN": "group norm: mean 0 and variance 1 over the channels of a group and the map, then a learned gain and offset per channel",
    "BN": "batch norm of that time step",
    "max\u2082": "maximum over squares of 2 \u00d7 2, half the size",
    "mean": "mean over the map",
    "R": "resized to the map of the left-hand side (bilinear)",
}
_ACTIVATION = {Activation.SIGMOID: "\u03c3", Activation.RELU: "relu", Activation.ELU: "elu", Activation.TANH: "tanh"}
_NORM = {Norm.LAYER: "LN", Norm.GROUP: "GN", Norm.BATCH: "BN"}
_POOL = {Pool.MAX: "max\u2082", Pool.MAX_SAME: "max\u2082", Pool.MEAN: "mean"}


@dataclass
class Equations:
    """Lines of HTML in the order in which they are computed, and the meaning of the letters in them (HTML -> text)."""

    lines: list[str] = field(default_factory=list)
    letters: dict[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """Both as HTML."""
        rows = "".join(f"<dt>{letter}</dt><dd>{html.escape(text)}</dd>" for letter, text in self.letters.items())
        return f'<div class="equations">{"".join(f"<p>{line}</p>" for line in self.lines)}</div><dl class="letters">{rows}</dl>'


def equations(network: Network) -> Equations:
    """The equations of a network from the image to the readout.

    >>> from rnndyn_fast.search import Architecture, build_network
    >>> found = equations(build_network(Architecture(depth=1), image_size=8, num_classes=10))
    >>> len(found.lines)
    4
    """
    return _Writer(network).write()


class _Writer:
    def __init__(self, network: Network) -> None:
        self.network, self.found = network, Equations()
        self.weights: dict[tuple[str, tuple[int, int] | None], str] = {}

    def write(self) -> Equations:
        """All lines."""
        letters = self.found.letters
        for one in self.network.inputs:
            letters[_map(one.name)] = f"input, {one.channels} \u00d7 {one.height} \u00d7 {one.width}"
        for area in self.network.areas:
            into = [c for c in self.network.connections if c.target == area.name]
            (self._cell if area.cell is not None else self._plain)(area, into)
        readout = self.network.readout
        if readout is not None:
            letters["<var>p</var>(<var>t</var>)"] = "probabilities of the classes"
            letters["<var>A</var>"] = f"readout, {readout.num_classes} \u00d7 {self.network.shapes[readout.source][0]}"
            letters["softmax"] = "softmax(x)\u1d62 = exp(x\u1d62) / \u03a3\u2c7c exp(x\u2c7c)"
            offset = ""
            if readout.bias:
                offset, letters["<var>a</var>"] = " + <var>a</var>", "offset of the readout, one per class"
            self.found.lines.append(f"<var>p</var>(<var>t</var>) = softmax(<var>A</var> {_at(readout.source)}{offset})")
        zero = [area.name for area in self.network.areas if "zero" in ((area.initial,) if isinstance(area.initial, str) else area.initial)]
        first = f"; the map of step {MINUS}1 is zero of {', '.join(zero)}" if zero else ""
        letters["<var>t</var>"] = (
            f"time step, from 0{first}; {'other maps' if zero else 'a map'} of step {MINUS}1: what they would add is left out"
        )
        letters[STAR] = f"convolution; {STAR}\u1d40 transposed convolution, which doubles the map"
        letters[DOT] = "product element by element"
        return self.found

    # ---------------------------------------------------------------- terms

    def _use(self, name: str, inner: str) -> str:
        """A function, of which the meaning goes into the letters."""
        self.found.letters[name] = _FUNCTIONS[name]
        return f"{name}({inner})"

    def _activated(self, activation: Activation, inner: str) -> str:
        return inner if activation is Activation.IDENTITY else self._use(_ACTIVATION[activation], inner)

    def _term(self, c: Connection) -> str:
        x = _at(c.source if c.state is None else f"{c.source}.{c.state}", later=self.network.delay(c) > 0)
        if c.pool in _POOL:
            x = self._use(_POOL[c.pool], x)
        if c.resize and self.network.shapes[c.source][1:] != self.network.shapes[c.target][1:]:
            x = self._use("R", x)
        if c.operator is Operator.IDENTITY:
            return x
        weight, bias = self._weight(c)
        star = STAR + ("\u1d40" if c.operator is Operator.CONV_TRANSPOSE else "")
        return f"{weight} {star} {x}{bias}"

    def _weight(self, c: Connection) -> tuple[str, str]:
        """The letter of a connection's weight, and of its bias where it has one."""
        assert c.parameter is not None
        key = (c.parameter, c.concat)
        letter = self.weights.setdefault(key, f"<var>W</var><sub>{len(self.weights) + 1}</sub>")
        height, width = self.network.window(c).kernel
        source = self.network.shapes[c.source][0]
        kind = f"kernel of {height} \u00d7 {width}"
        if c.middle_channels is not None:
            kind = f"depthwise kernel of {height} \u00d7 {width}, then one of 1 \u00d7 1"
        stride = f", stride {c.stride}" if c.stride > 1 and c.operator is Operator.CONV else ""
        channels = f"{source} \u2192 {self.network.target_channels(c)} channels"
        self.found.letters[letter] = f"{kind}, {channels}{stride} (parameter {c.parameter})"
        if not (c.bias or (c.middle_channels is not None and c.middle_bias)):
            return letter, ""
        bias = letter.replace("W", "b", 1)
        self.found.letters[bias] = f"bias of {html.unescape(_plain(letter))}, one number per channel"
        return letter, f" + {bias}"

    def _sum(self, into: Sequence[Connection]) -> str:
        return " + ".join(self._term(c) for c in into)

    # ---------------------------------------------------------------- areas

    def _define(self, name: str, right: str, what: str) -> None:
        self.found.letters[_map(name)] = what
        self.found.lines.append(f"{_at(name)} = {right}")

    def _size(self, area: Area) -> str:
        return " \u00d7 ".join(map(str, self.network.shapes[area.name]))

    def _plain(self, area: Area, into: Sequence[Connection]) -> None:
        drive = self._sum([c for c in into if self.network.port(c) == "drive"]) or "0"
        modulator = self._sum([c for c in into if self.network.port(c) == "modulator"])
        value = self._activated(area.drive_activation, drive)
        if modulator:
            squashed = area.interaction is Interaction.SQUASHED
            factor = f"2 {self._use(_ACTIVATION[Activation.SIGMOID], modulator)}" if squashed else f"(1 + {modulator})"
            value = f"({value}) {DOT} {factor}"
        norm = Norm.LAYER if area.norm is None else area.norm
        if norm in _NORM:
            value = self._use(_NORM[norm], value)
        value = self._activated(Activation.RELU if area.activation is None else area.activation, value)
        self._define(area.name, value, f"map, {self._size(area)}")

    def _cell(self, area: Area, into: Sequence[Connection]) -> None:
        cell, name = area.cell, area.name
        assert cell is not None
        ports: dict[str, str] = {}
        for port in cell.ports:
            entering = [c for c in into if self.network.port(c) == port]
            if not entering:
                ports[port] = ""
            elif len(entering) == 1 and entering[0].operator is Operator.IDENTITY:
                ports[port] = self._term(entering[0])
            else:
                self._define(f"{name}.{port}", self._sum(entering), f"what enters the port {port} of {name}")
                ports[port] = _at(f"{name}.{port}")
        size = f"map, {self._size(area)}"
        write = {
            TimeDecay: self._time_decay, GRUGates: self._gru_gates, GRUUpdate: self._gru_update, LSTM: self._lstm, UGRNN: self._ugrnn,
            IntersectionRNN: self._intersection, ReciprocalGated: self._reciprocal,
        }[type(cell)]  # fmt: skip
        write(area, ports, size)

    def _parts(self, area: Area, gates: str, names: Sequence[str]) -> list[str]:
        """The gates of a port, each a block of its channels, as maps of their own."""
        normed = getattr(area.cell, "layer_norm", False)
        made = self._use("GN", gates) if normed else gates
        parts = [f"{area.name}.{name}" for name in names]
        self.found.lines.append(f"({', '.join(map(_at, parts))}) = {made}")
        for part, name in zip(parts, names, strict=True):
            self.found.letters[_map(part)] = f"part {name} of the gates of {area.name}, in the order of channels"
        return [_at(part) for part in parts]

    def _gate(self, inner: str, bias: float = 0.0) -> str:
        return self._use("\u03c3", inner + _signed(bias))

    def _time_decay(self, area: Area, p: dict[str, str], size: str) -> None:
        letter = f"<var>m</var><sub>{html.escape(area.name)}</sub>"
        self.found.letters[letter] = "learned number"
        self._define(area.name, f"{letter} {p['memory']} + {p['drive']}", size)

    def _gru_gates(self, area: Area, p: dict[str, str], size: str) -> None:
        assert isinstance(area.cell, GRUGates)
        reset, update = self._parts(area, p["gates"], ("r", "v"))
        self._define(f"{area.name}.rh", f"{self._gate(reset, area.cell.forget_bias)} {DOT} {p['memory']}", f"{size}: the memory, reset")
        self._define(f"{area.name}.u", self._gate(update), f"{size}: how much of the memory is kept")

    def _gru_update(self, area: Area, p: dict[str, str], size: str) -> None:
        assert isinstance(area.cell, GRUUpdate)
        inner = self._use("GN", p["candidate"]) if area.cell.layer_norm else p["candidate"]
        new = self._activated(area.cell.activation, inner)
        self._define(area.name, f"{p['update']} {DOT} {p['memory']} + (1 {MINUS} {p['update']}) {DOT} {new}", size)

    def _lstm(self, area: Area, p: dict[str, str], size: str) -> None:
        cell = area.cell
        assert isinstance(cell, LSTM)
        i, j, f, g = self._parts(area, p["gates"], ("i", "j", "f", "g"))
        peep = {"i": "", "f": "", "g": ""}
        if cell.peepholes:
            for gate in peep:
                letter = f"<var>q</var><sub>{gate}, {html.escape(area.name)}</sub>"
                self.found.letters[letter] = f"peephole of the gate {gate}, {size}"
                peep[gate] = f" + {letter} {DOT} {p['memory']}"
        keep, enter = self._gate(f + peep["f"], cell.forget_bias), self._gate(i + peep["i"])
        value = f"{p['memory']} {DOT} {keep} + {enter} {DOT} {self._activated(cell.activation, j)}"
        value = self._use("GN", value) if cell.layer_norm else value
        self._define(f"{area.name}.c", value, f"{size}: the memory")
        out = self._activated(cell.activation, _at(f"{area.name}.c"))
        self._define(area.name, f"{out} {DOT} {self._gate(g + peep['g'])}", size)

    def _ugrnn(self, area: Area, p: dict[str, str], size: str) -> None:
        assert isinstance(area.cell, UGRNN)
        gate, new = self._parts(area, p["gates"], ("g", "q"))
        self._define(f"{area.name}.s", self._gate(gate, area.cell.forget_bias), f"{size}: how much of the memory is kept")
        kept = _at(f"{area.name}.s")
        self._define(area.name, f"{kept} {DOT} {p['memory']} + (1 {MINUS} {kept}) {DOT} {self._use('tanh', new)}", size)

    def _intersection(self, area: Area, p: dict[str, str], size: str) -> None:
        assert isinstance(area.cell, IntersectionRNN)
        gh, q, gy, y = self._parts(area, p["gates"], ("g", "q", "k", "y"))
        for name, gate in (("s", gh), ("d", gy)):
            self._define(f"{area.name}.{name}", self._gate(gate, area.cell.forget_bias), f"{size}: gate")
        s, d = _at(f"{area.name}.s"), _at(f"{area.name}.d")
        self._define(f"{area.name}.h", f"{s} {DOT} {p['memory']} + (1 {MINUS} {s}) {DOT} {self._use('tanh', q)}", f"{size}: the memory")
        self._define(area.name, f"{d} {DOT} {p['input']} + (1 {MINUS} {d}) {DOT} {self._use('relu', y)}", size)

    def _reciprocal(self, area: Area, p: dict[str, str], size: str) -> None:
        cell = area.cell
        assert isinstance(cell, ReciprocalGated)
        kept, entering = self._gain(cell.tau_gain, p["tau"]), self._gain(cell.gate_gain, p["gate"])
        drive = (p["drive"] or "0") + _signed(cell.drive_bias)
        drive = f"({drive})" if cell.drive_bias and entering else drive
        value = f"{kept + ' ' + DOT + ' ' if kept else ''}{p['memory']} + {entering + ' ' + DOT + ' ' if entering else ''}{drive}"
        self._define(area.name, self._activated(cell.activation, value), size)

    def _gain(self, gain: Gain, port: str) -> str:
        """offset + multiplier * nonlinearity(x + bias); empty where that is 1."""
        if gain.multiplier == 0:
            return "" if gain.offset == 1 else f"{gain.offset:g}"
        inner = self._activated(gain.nonlinearity, (port or "0") + _signed(gain.bias))
        size = "" if abs(gain.multiplier) == 1 else f"{abs(gain.multiplier):g} "
        if gain.offset == 0 and gain.multiplier > 0:
            return size + inner
        offset = f"{gain.offset:g} " if gain.offset else ""
        return f"({offset}{'+' if gain.multiplier > 0 else MINUS} {size}{inner})"


def _signed(number: float) -> str:
    return "" if number == 0 else f" {'+' if number > 0 else MINUS} {abs(number):g}"


def _map(name: str) -> str:
    return f'<span class="map">{html.escape(name)}</span>'


def _at(name: str, *, later: bool = False) -> str:
    """A map at this time step, or at the step before."""
    return f"{_map(name)}(<var>t</var>{f' {MINUS} 1' if later else ''})"


def _plain(letter: str) -> str:
    return letter.replace("<var>", "").replace("</var>", "").replace("<sub>", "").replace("</sub>", "")
