"""Update rules of areas as instructions: gated cells and norms by their fused kernels, everything else by PyTorch.

The terms of a port arrive as :class:`Port`: values [N, H, W, C], without biases, which the kernels add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnndyn_fast.graph.spec.network import Activation, Area, Connection, Interaction, Norm
from rnndyn_fast.ops import core
from rnndyn_fast.ops.gate_step import ACTIVATION_NUMBERS, MAX_PORT_TERMS, can_compute_cell, gate_scalars
from rnndyn_fast.ops.norm_step import MAX_NORM_TERMS, NormKind, NormRule, as_fixed
from rnndyn_fast.program.area_steps import AreaSteps
from rnndyn_fast.program.ir import Role, View
from rnndyn_fast.program.maps import Key, map_key
from rnndyn_fast.reference.rollout import Statistics, update_area

if TYPE_CHECKING:
    from rnndyn_fast.program.terms import Terms

# Activations whose slope follows from their value.
_BY_OUTPUT = (Activation.RELU, Activation.ELU, Activation.TANH)


def begin_with(room: View, values: list[View]) -> None:
    """Put the value that lies in ``room``, if there is one, first: a kernel writes the sum of terms over the first one alone."""
    values.sort(key=lambda value: not value.same_place(room))


@dataclass(eq=False)
class Port:
    """What enters one port of an area at one or more slots.

    ``keys``: for each term those of its gradient, one per slot. ``private``: the first value may be written, as nobody else reads it. A
    port that only maps of zeros enter has one value, of zeros. ``again`` makes the only value once more, where it need not be kept.
    """

    values: list[Any] = field(default_factory=list)  # views [N, H, W, m C], or of ``area_step`` Pending
    connections: list[Connection] = field(default_factory=list)
    keys: list[list[Key]] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    constant: float = 0.0  # added like a bias
    private: bool = False
    again: Callable[[], View] | None = None


@dataclass(frozen=True)
class Slots:
    """The slots of an area that are computed together, as samples one after another."""

    area: Area
    indices: range
    step: int  # time step of the first

    def keys(self, state: str | None) -> list[Key]:
        """Of the gradients of a state."""
        return [map_key(self.area.name, slot, state) for slot in self.indices]


Total = View | Callable[[], View]  # the sum of a port: kept, or made again


@dataclass(frozen=True, eq=False)
class CellStep:
    """A cell was computed."""

    at: Slots
    ports: list[tuple[str, Port]]
    totals: list[Total]


@dataclass(frozen=True, eq=False)
class NormStep:
    """An area of ``norm_step`` was computed."""

    at: Slots
    rule: NormRule
    drive: Port
    modulator: Port
    totals: tuple[View | None, View | None]
    mean: View | None
    rstd: View | None
    gamma: View | None
    beta: View | None
    prefix: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AliasStep:
    """An area's state is its only term."""

    at: Slots
    drive: Port


@dataclass(frozen=True, eq=False)
class ActivationStep:
    """An area is an activation of its drive, whose slope follows from its state."""

    at: Slots
    drive: Port
    state: View


class AreaRules:
    """Computes areas and notes what was done."""

    def __init__(self, maps: Terms) -> None:
        self.maps, self.b, self.network = maps, maps.b, maps.network
        self.statistics: dict[str, tuple[View, View]] = {}  # mean and unbiased variance of batch norms, in training
        self._bias_rows: dict[tuple[str, ...], View] = {}
        self._norms: dict[str, NormRule | None] = {}
        self._kernels: dict[str, bool] = {}
        self.area_steps = AreaSteps(self)

    def update(self, at: Slots, ports: Mapping[str, Port]) -> dict[str | None, View]:
        """The maps of an area by state."""
        if self.area_steps.takes(at.area):
            return self.area_steps.update(at, ports["drive"], ports.get("modulator", Port()))
        if not self.has_kernel(at.area):
            return self._by_torch(at, ports)
        if at.area.cell is not None:
            return self._cell(at, ports)
        if self.by_output(at.area):
            return self._activation(at, ports["drive"])
        rule = self.norm_rule(at.area)
        assert rule is not None
        return self._norm(at, ports, rule)

    def has_kernel(self, area: Area) -> bool:
        """Whether a kernel of ours computes an area. (That of gates has no norm.)"""
        if area.name not in self._kernels:
            known = self.norm_rule(area) is not None if area.cell is None else can_compute_cell(area.cell)
            self._kernels[area.name] = known and not getattr(area.cell, "layer_norm", False)
        return self._kernels[area.name]

    # ---------------------------------------------------------------- ports

    def bias(self, port: Port) -> View | None:
        """The sum of a port's biases and constant, [m C]."""
        if not port.biases and not port.constant:
            return None
        names = (*port.biases, *([f"{port.constant!r} x {port.values[0].shape[3]}"] if port.constant else []))
        if names not in self._bias_rows:
            rows = [self.maps.affine(name) for name in port.biases]
            if port.constant:
                rows.append(self.b.new((port.values[0].shape[3],), self.maps.sums_dtype, names[-1]))
                self.b.emit("fill", out=rows[-1], value=port.constant)
            if len(rows) > 1:
                total = self.b.new(rows[0].shape, rows[0].dtype, " + ".join(names))
                self.b.emit("total", terms=rows, out=total)
                rows = [total]
            self._bias_rows[names] = rows[0]
        return self._bias_rows[names]

    def room(self, at: Slots, kind: str, channels: int) -> View:
        """Where a kind of map of an area (a port, a state, "grad <port>") goes."""
        return self.maps.room(at.area.name, at.indices, kind, channels)

    def _sum_room(self, at: Slots, name: str, port: Port, limit: int) -> tuple[list[View], View | None]:
        """The terms as a kernel takes them, and where it is to put their sum; None: one term, which is the sum, or nobody wants it."""
        if not port.private:
            room = self.room(at, name, port.values[0].shape[3])
            begin_with(room, port.values)
        values = self.b.at_most(port.values, limit)
        if len(values) == 1 and not port.biases and not port.constant:
            return values, None
        if at.area.cell is not None and not self.maps.recording:
            return values, None
        if port.private:
            return values, values[0]
        port.private = True
        return values, room

    # ---------------------------------------------------------------- cells

    def _cell(self, at: Slots, ports: Mapping[str, Port]) -> dict[str | None, View]:
        cell, channels = at.area.cell, at.area.channels
        assert cell is not None
        given: list[tuple[str, Port]] = []
        terms, sums, biases = [], [], []
        shape = next(iter(ports.values())).values[0].shape[:3]
        for name, multiple in cell.ports.items():
            port = ports.get(name, Port())
            if not port.values:
                port.values.append(self.b.zeros((*shape, multiple * channels), self.maps.dtype, f"{at.area.name} {name}"))
                port.private = True
            port.constant = cell.constants.get(name, 0.0)
            values, room = self._sum_room(at, name, port, MAX_PORT_TERMS)
            terms.append(values)
            sums.append(room)
            biases.append(self.bias(port))
            given.append((name, port))
        states: dict[str | None, View] = {state: self.room(at, f"state {state}", channels) for state in cell.states}
        self.b.emit("gate_step", scalars=gate_scalars(cell), ports=terms, biases=biases, sums=sums, states=list(states.values()))
        totals = [
            room if room is not None else port.again if port.again is not None else values[0]
            for values, room, (_, port) in zip(terms, sums, given, strict=True)
        ]
        self.maps.record(CellStep(at, given, totals))
        return states

    # ---------------------------------------------------------------- norms

    def norm_rule(self, area: Area) -> NormRule | None:
        """The rule of ``norm_step`` for an area; None where the kernel has none."""
        if area.name not in self._norms:
            known = (
                area.interaction in (Interaction.ADDITIVE, Interaction.SQUASHED)
                and area.norm in (Norm.NONE, Norm.GROUP, Norm.BATCH)
                and area.drive_activation in (Activation.IDENTITY, Activation.RELU)
                and area.activation in ACTIVATION_NUMBERS
            )
            by_batch = self.maps.setting.training and not area.norm_frozen
            kinds = {Norm.GROUP: NormKind.GROUP, Norm.BATCH: NormKind.BATCH if by_batch else NormKind.FIXED}
            assert area.norm is not None
            assert area.activation is not None
            groups = area.norm_groups if area.norm is Norm.GROUP else 1
            rectify = area.drive_activation is Activation.RELU
            kind = kinds.get(area.norm, NormKind.NONE)
            self._norms[area.name] = NormRule(kind, groups, area.eps, area.activation, rectify) if known else None
        return self._norms[area.name]

    def norm_workspace(self, shape: Sequence[int], rule: NormRule) -> View | None:
        """Scratch of the kernel."""
        if self.b.on_device:
            return None
        n, h, w, c = shape
        return self.b.new((core.norm_workspace_size(n, h * w, c, rule.groups),), torch.float32, "norm workspace")

    def emit_norm_step(self, rule: NormRule, *, drives: list[View], modulators: list[View], state: View, **operands: Any) -> None:
        """One call of the kernel; operands that are left out are absent."""
        names = ("drive_bias", "modulator_bias", "gamma", "beta", "drive_sum", "modulator_sum", "mean", "rstd", "variance")
        driven = bool(drives) or operands.get("drive_bias") is not None
        squash = driven and (bool(modulators) or operands.get("modulator_bias") is not None)
        full = {name: operands.get(name) for name in names}
        if not squash:
            modulators, full["modulator_bias"] = [], None
        workspace = self.norm_workspace(state.shape, rule)
        self.b.emit("norm_step", rule=rule, squash=squash, drives=drives, modulators=modulators, state=state, workspace=workspace, **full)

    def _statistics(self, rule: NormRule, at: Slots, prefix: str, samples: int) -> tuple[View | None, View | None, View | None]:
        """Mean, reciprocal deviation and variance, where there are some."""
        if rule.kind is NormKind.NONE:
            return None, None, None
        dtype, channels = self.maps.sums_dtype, at.area.channels
        size = (samples, rule.groups) if rule.kind is NormKind.GROUP else (channels,)
        rstd = self.b.new(size, dtype, f"{prefix} rstd")
        if rule.kind is NormKind.FIXED:
            variance = self.maps.affine(f"{prefix}.running_var")
            self.b.emit("reciprocal_deviation", variance=variance, rstd=rstd, eps=rule.eps)
            return self.maps.affine(f"{prefix}.running_mean"), rstd, None
        taken = self.b.new(size, dtype, f"{prefix} variance") if rule.kind is NormKind.BATCH else None
        return self.b.new(size, dtype, f"{prefix} mean"), rstd, taken

    def norm_prefix(self, at: Slots) -> str:
        """Of the norm's parameters."""
        return f"{at.area.norm_parameter}.{at.step}" if at.area.norm is Norm.BATCH else str(at.area.norm_parameter)

    def _norm(self, at: Slots, ports: Mapping[str, Port], rule: NormRule) -> dict[str | None, View]:
        area = at.area
        drive, modulator = ports["drive"], ports.get("modulator", Port())
        plain = rule.kind is NormKind.NONE and rule.activation is Activation.IDENTITY and not rule.rectify_drive
        if plain and len(drive.values) == 1 and not drive.biases and not modulator.values:
            self.maps.record(AliasStep(at, drive))
            return {None: drive.values[0]}
        prefix = self.norm_prefix(at)
        normed = rule.kind is not NormKind.NONE
        gamma, beta = (self.maps.affine(f"{prefix}.{kind}") if normed else None for kind in ("weight", "bias"))
        if not drive.values:
            drive, modulator = Port(), Port()  # zero, whatever modulates it
        (drives, drive_room), (modulators, modulator_room) = (
            self._sum_room(at, name, port, MAX_NORM_TERMS)
            if self.maps.recording and port.values
            else (self.b.at_most(port.values, MAX_NORM_TERMS), None)
            for name, port in (("drive", drive), ("modulator", modulator))
        )
        state = self.room(at, "state None", area.channels)
        mean, rstd, variance = self._statistics(rule, at, prefix, state.shape[0])
        self.emit_norm_step(
            rule, drives=drives, modulators=modulators, state=state, drive_bias=self.bias(drive), modulator_bias=self.bias(modulator),
            gamma=gamma, beta=beta, drive_sum=drive_room, modulator_sum=modulator_room, mean=mean, rstd=rstd, variance=variance,
        )  # fmt: skip
        if variance is not None:
            assert mean is not None
            count = state.numel // area.channels
            self.give_statistics(prefix, mean, variance, count / max(count - 1, 1))
        if self.maps.recording:
            totals = (drives[0] if drive_room is None and drives else drive_room,
                      modulators[0] if modulator_room is None and modulators else modulator_room)  # fmt: skip
            step = NormStep(at, rule, drive, modulator, totals, mean, rstd, gamma, beta, prefix, state.shape)
            self.maps.record(step)
            if len(at.indices) == 1 and totals[0] is not None:
                self.maps.remakers.states[map_key(area.name, at.indices[0], None)] = partial(self._norm_again, step)
        return {None: state}

    def statistics_result(self, prefix: str, channels: int) -> tuple[View, View]:
        """Where the caller gets the mean and the unbiased variance of a batch norm."""
        dtype = self.maps.sums_dtype
        mean, variance = (self.b.external(Role.RESULT, f"{prefix} {kind}", (channels,), dtype) for kind in ("mean", "variance"))
        self.statistics[prefix] = mean, variance
        return mean, variance

    def give_statistics(self, prefix: str, mean: View, variance: View, unbiased: float) -> None:
        """Mean and unbiased variance of a batch norm, to the caller."""
        means, variances = self.statistics_result(prefix, mean.shape[0])
        self.b.emit("copy", x=mean, out=means)
        self.b.emit("scale", x=variance, out=variances, factor=unbiased)

    def _norm_again(self, step: NormStep, state: View | None) -> View:
        """The state of an area once more, to the bit, from the sums that its step left."""
        rule, mean, rstd = step.rule, step.mean, step.rstd
        drive, modulator = step.totals
        assert drive is not None
        if state is None:
            state = self.room(step.at, "again None", step.at.area.channels)
        if rule.kind is NormKind.BATCH:  # (whose statistics need not be taken again)
            rule = as_fixed(rule)
        elif rule.kind is NormKind.GROUP:
            assert mean is not None
            mean, rstd = (self.b.new(mean.shape, mean.dtype, f"{step.prefix} {kind} again") for kind in ("mean", "rstd"))
        modulators = [modulator] if modulator is not None else []
        self.emit_norm_step(
            rule, drives=[drive], modulators=modulators, state=state, gamma=step.gamma, beta=step.beta, mean=mean, rstd=rstd
        )
        return state

    # ---------------------------------------------------------------- activations

    def by_output(self, area: Area) -> bool:
        """Whether an area is only an activation of its drive, whose slope follows from its state: then nothing else is kept."""
        return (
            area.cell is None
            and area.norm is Norm.NONE
            and area.activation in _BY_OUTPUT
            and area.drive_activation is Activation.IDENTITY
            and not any(self.network.port(c) == "modulator" for c in self.network.connections if c.target == area.name)
        )

    def place_of(self, area: Area, port: str) -> str:
        """The kind of map in whose place a port's sum is computed."""
        return "state None" if self.by_output(area) else port

    def _activation(self, at: Slots, drive: Port) -> dict[str | None, View]:
        rule = self.norm_rule(at.area)
        assert rule is not None
        state = self.room(at, "state None", at.area.channels)
        begin_with(state, drive.values)
        drives = self.b.at_most(drive.values, MAX_NORM_TERMS)
        bias = self.bias(drive)
        several = len(drives) > 1 or bias is not None
        self.emit_norm_step(rule, drives=drives, modulators=[], state=state, drive_bias=bias, drive_sum=state if several else None)
        self.maps.record(ActivationStep(at, drive, state))
        return {None: state}

    # ---------------------------------------------------------------- everything else

    def _by_torch(self, at: Slots, ports: Mapping[str, Port]) -> dict[str | None, View]:
        area, states, network = at.area, at.area.states, self.network
        sources = [(key, part) for port in ports.values() for value, keys in zip(port.values, port.keys, strict=True)
                   for key, part in zip(keys, value.parts(len(keys)), strict=True)]  # fmt: skip
        count = len(at.indices)
        given = [(list(port.connections), list(port.biases)) for port in ports.values()]
        samples, (channels, height, width) = self.maps.samples, network.shapes[area.name]
        inner = self.maps.sums_dtype
        takes_statistics = area.norm is Norm.BATCH and self.maps.setting.training and not area.norm_frozen

        def area_update(xs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
            rest, terms = list(xs), []
            for connections, biases in given:
                for k, c in enumerate(connections):
                    value = torch.cat(rest[:count]) if count > 1 else rest[0]
                    del rest[:count]
                    if k == 0 and biases:
                        value = value + torch.stack([parameters[name] for name in biases]).sum(0)
                    terms.append((c, value.permute(0, 3, 1, 2)))
            like = (count * samples, channels, height, width)
            statistics: Statistics | None = {} if takes_statistics else None
            # (Without terms and parameters a parameter still tells the dtype.)
            known = parameters or {"": torch.zeros((), dtype=inner)}
            maps = update_area(network, area, at.step, terms, known, statistics, like)
            assert maps is not None
            found = [part for state in states for part in maps[state].permute(0, 2, 3, 1).chunk(count)]
            return [*found, *(t for pair in (statistics or {}).values() for t in pair)]

        shape = (samples, height, width, channels)
        results = [(key, shape) for state in states for key in at.keys(state)]
        prefixes = [str(p) for p in (area.norm_parameter, area.cell_parameter) if p is not None]
        biases = [name for port in ports.values() for name in port.biases]
        more = self.statistics_result(self.norm_prefix(at), channels) if takes_statistics else ()
        values = self.maps.by_torch(area_update, sources, results, [*prefixes, *biases], exact=True, more=more)
        return {state: self.b.stacked(values[k * count : (k + 1) * count]) for k, state in enumerate(states)}
