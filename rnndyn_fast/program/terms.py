"""Terms of a rollout while it is lowered: linear maps of its maps (:mod:`rnndyn_fast.program.maps`), and the ports that they fill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from rnndyn_fast.graph.linear import chooser
from rnndyn_fast.graph.schedule import Drive, Schedule, Term
from rnndyn_fast.graph.spec.network import Connection, Interaction, Operator, Pool
from rnndyn_fast.ops.engines import MAX_SUMMED, can_sum, can_wait
from rnndyn_fast.program.area_steps import Pending
from rnndyn_fast.program.areas import AreaRules, Port
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import View
from rnndyn_fast.program.linear import Dense, Linear, convolve_sum, linear_map
from rnndyn_fast.program.maps import Key, Maps, Remade, Setting, map_key, term_key
from rnndyn_fast.reference.rollout import term

LARGE_PACKED = 2 << 20  # bytes of a packed weight

Reading: TypeAlias = View | Remade | int  # what backward reads: a map that is kept, one that is made again, or the slot of an input


@dataclass(frozen=True)
class LinearStep:
    """Some positions of a drive were evaluated. ``xs``: what backward reads; ``keys``: of their gradients."""

    drive: int
    first: int
    xs: tuple[Reading, ...]
    keys: tuple[Key, ...]
    need_weight: bool


class Terms(Maps):
    """Of one rollout."""

    def __init__(
        self, b: Builder, schedule: Schedule, inputs: Mapping[str, View], parameters: Mapping[str, View], setting: Setting
    ) -> None:
        super().__init__(b, schedule, inputs, parameters, setting)
        self.rules = AreaRules(self)
        self.terms: dict[tuple[int, int], View] = {}
        self.linear: dict[int, Linear | None] = {}
        self.packed: dict[tuple[Any, ...], Linear | None] = {}
        self.keeps_packed = not self.recording  # for the next rollout
        self.uses = Counter((t.drive, t.position) for terms in schedule.terms.values() for t in terms)
        self.uses_left = Counter(self.uses)
        self._at_once: set[int] = set()  # drives that were evaluated for all steps in one call
        self.ahead: set[int] = set()  # drives that are evaluated in windows
        self.postponed: set[int] = set()  # drives whose weights' gradients wait for a window of steps

    # ---------------------------------------------------------------- terms

    def linear_of(self, drive: Drive) -> Linear | None:
        """The linear map of a drive, prepared once; None: PyTorch computes the term, bias included."""
        if drive.index not in self.linear:
            c, setting = drive.connection, self.setting
            key = (c.operator, c.weights, c.stride, c.groups, c.concat, self.network.window(c), self.network.read_size(c))
            if key not in self.packed:
                device = setting.device if setting.on_device else None
                choose = chooser(setting.engine, self.samples, len(drive.slots), self.dtype, device)
                self.packed[key] = linear_map(self, c, choose, keep=self.keeps_packed)
            self.linear[drive.index] = self.packed[key]
        return self.linear[drive.index]

    def evaluate(self, index: int, first: int, last: int, out: View | None = None, *, note: bool = True) -> None:
        """Positions first..last-1 of a drive, in one call. ``note``: one step for the backward pass."""
        drive = self.schedule.drives[index]
        slots = drive.slots[first:last]
        positions = [(index, first + k) for k in range(len(slots))]
        if drive.connection.operator is Operator.IDENTITY:
            for p, slot in zip(positions, slots, strict=True):
                self.terms[p] = self.form(drive, slot)[0]
        elif (linear := self.linear_of(drive)) is None:
            for p, slot in zip(positions, slots, strict=True):
                self._term_by_torch(drive, p, slot)
        else:
            forms = [self.form(drive, slot) for slot in slots]
            value = linear.forward(self.b.stacked([x for x, _ in forms], f"{drive.source} steps"), out)
            self.terms.update(zip(positions, value.parts(len(slots)), strict=True))
            if note:
                self.record_linear(index, first, forms)

    def _reads_pooled(self, drive: Drive) -> bool:
        """Whether a drive reads a pooled form of its map, and not the map."""
        c = drive.connection
        return c.pool is not Pool.NONE and (c.operator is Operator.IDENTITY or self.linear_of(drive) is not None)

    def pool_early(self, name: str, slot: int) -> None:
        """Where components run one after another, what the next ones read pooled is pooled at once, so that the map need not live."""
        if self.by_component:
            for drive in self.schedule.drives:
                if drive.source == name and slot in drive.slots and self._reads_pooled(drive):
                    self.form(drive, slot)

    def _term_by_torch(self, drive: Drive, position: tuple[int, int], slot: int) -> None:
        c, state = drive.connection, self.state(drive.connection, drive.source)
        channels, height, width = drive.shape

        def linear_term(xs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
            return [term(self.network, c, xs[0].permute(0, 3, 1, 2), parameters).permute(0, 2, 3, 1)]

        source = (map_key(drive.source, slot, state), self.map(drive.source, slot, state))
        result = (term_key(*position), (self.samples, height, width, channels))
        (self.terms[position],) = self.by_torch(linear_term, [source], [result], [*c.weights, *c.biases])

    def record_linear(self, index: int, first: int, forms: Sequence[tuple[View, Key]]) -> None:
        """Note an evaluation, if backward has anything to do with it."""
        if not self.recording:
            return
        drive = self.schedule.drives[index]
        weights = self.wanted.intersection((*drive.connection.weights, *drive.connection.biases))
        if weights or drive.source in self.reaches:
            slots = drive.slots[first : first + len(forms)]
            xs: list[Reading] = [*slots] if self.is_plain_input(drive) else [self.remakers.reading(key, x) for x, key in forms]
            self.record(LinearStep(index, first, tuple(xs), tuple(key for _, key in forms), bool(weights)))

    # ---------------------------------------------------------------- ports

    def ports(self, name: str, slots: range) -> dict[str, Port]:
        """The terms that enter an area, evaluated where they are not yet."""
        area = self.network.area(name)
        ports = {port: Port() for port in area.ports}
        entering: dict[str, list[Term]] = {port: [] for port in area.ports}
        for t in self.schedule.terms[name, slots[0]]:
            entering[self.network.port(t.connection)].append(t)
        fill = self._fill_waiting if self.rules.area_steps.takes(area) else self._fill
        for port_name, terms in entering.items():
            fill(name, slots, port_name, terms, ports[port_name])
        for c in self.schedule.zeros[name, slots[0]]:
            port = ports[self.network.port(c)]
            if c.output_bias is not None:
                port.biases.append(c.output_bias)
            if not port.values or (c.middle_bias and c.middle_channels is not None):
                self._zero_term(c, len(slots), port)
        return ports

    def _zero_term(self, c: Connection, count: int, port: Port) -> None:
        channels, height, width = self.network.term_shape(c)
        value = self.b.zeros((count * self.samples, height, width, channels), self.dtype, f"{c.label} of zeros")
        keys: list[Key] = [None] * count
        if c.middle_bias and c.middle_channels is not None:
            # What is between is its bias, everywhere.
            names = (c.weights[1], c.biases[0])
            constant = ("constant", c.label, id(port))

            def constant_term(xs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
                return [xs[0] + (parameters[names[0]].flatten(1) @ parameters[names[1]])]

            (value,) = self.by_torch(constant_term, [(None, value)], [(constant, value.shape)], names)
            keys = [constant] * count  # (one: a batch of slots reads no zeros)
        port.values.insert(0, value)
        port.connections.insert(0, c)
        port.keys.insert(0, keys)
        port.private = True

    def _fill(self, name: str, slots: range, port_name: str, terms: list[Term], port: Port) -> None:
        kernel = self.rules.has_kernel(self.network.area(name))  # else values stay as many as terms, and in order
        place = self.rules.place_of(self.network.area(name), port_name)
        for t in terms:
            if t.drive in self.ahead and (t.drive, t.position) not in self.terms:
                self.evaluate(t.drive, t.position, self.window_end(t.drive, t.position))
        fresh = [t for t in terms if (t.drive, t.position) not in self.terms and self._summable(t)] if kernel else []
        summed: list[Term] = []
        if len(slots) == 1 and len(fresh) == 1 and not any((t.drive, t.position) in self.terms and self._private(t) for t in terms):
            out = self.room(name, slots, place, self.schedule.drives[fresh[0].drive].shape[0])
            self.evaluate(fresh[0].drive, fresh[0].position, fresh[0].position + 1, out)
        elif len(slots) == 1 and 2 <= len(fresh) <= MAX_SUMMED:
            maps = [m for t in fresh if isinstance(m := self.linear[t.drive], Dense)]
            if can_sum(maps):
                summed = fresh
                out = self.room(name, slots, place, self.schedule.drives[fresh[0].drive].shape[0])
                forms = [self.form(drive := self.schedule.drives[t.drive], drive.slots[t.position]) for t in summed]
                convolve_sum(maps, [x for x, _ in forms], out)
                for t, form in zip(summed, forms, strict=True):
                    self.record_linear(t.drive, t.position, [form])
                port.values.append(out)
                port.private = True
        keys = []
        for t in terms:
            drive = self.schedule.drives[t.drive]
            identity = drive.connection.operator is Operator.IDENTITY
            positions = range(t.position, t.position + len(slots))
            if t not in summed:
                parts = [self._value(t.drive, p) for p in positions]
                if kernel and not port.private and all(self._private(t, p) for p in positions):
                    port.values.insert(0, self.b.stacked(parts))
                    port.private = True
                else:
                    port.values.append(self.b.stacked(parts))
                if identity and len(terms) == 1 and self.is_plain_input(drive):
                    port.again = partial(self.shown, drive.source, [drive.slots[p] for p in positions])
            if identity:
                keys.append([self.form_keys[t.drive, drive.slots[p]] if drive.source in self.reaches else None for p in positions])
            else:
                keys.append([term_key(t.drive, p) for p in positions])
            port.connections.append(t.connection)
            if t.connection.output_bias is not None and self.linear.get(t.drive, True) is not None:
                port.biases.append(t.connection.output_bias)
        port.keys = keys

    def _fill_waiting(self, name: str, slots: range, port_name: str, terms: list[Term], port: Port) -> None:
        """The same for ``area_step``: convolutions that can end with its epilogue are left to be computed."""
        may_wait = self.rules.area_steps.waits(self.network.area(name), port_name)
        for t in terms:
            drive = self.schedule.drives[t.drive]
            identity = drive.connection.operator is Operator.IDENTITY
            positions = range(t.position, t.position + len(slots))
            if not identity:
                self.linear_of(drive)
            there = any((t.drive, p) in self.terms for p in positions)
            private = all(self._private(t, p) for p in positions)
            linear = None if identity else self.linear[t.drive]
            batched = len(slots) > 1 or len(drive.slots) == 1
            if may_wait and private and not there and isinstance(linear, Dense) and linear.border is None and can_wait(linear) and (
                batched or t.drive not in self.ahead
            ):  # fmt: skip
                forms = [self.form(drive, drive.slots[p]) for p in positions]
                port.values.append(Pending(linear, self.b.stacked([x for x, _ in forms], f"{drive.source} steps")))
                self.record_linear(t.drive, t.position, forms)
            else:
                if t.drive in self.ahead:
                    self._ahead(name, t, positions, private=private)
                value = self.b.stacked([self._value(t.drive, p) for p in positions])
                self.uses_left.subtract((t.drive, p) for p in positions)
                last = not identity and all(self.uses_left[t.drive, p] == 0 for p in positions)
                if not port.private and (private or (last and not self.recording)):
                    port.values.insert(0, value)
                    port.private = True
                else:
                    port.values.append(value)
            if identity:
                port.keys.append([self.form_keys[t.drive, drive.slots[p]] if drive.source in self.reaches else None for p in positions])
            else:
                port.keys.append([term_key(t.drive, p) for p in positions])
            port.connections.append(t.connection)
            if t.connection.output_bias is not None and (identity or linear is not None):
                port.biases.append(t.connection.output_bias)

    def _ahead(self, name: str, t: Term, positions: range, *, private: bool) -> None:
        """Evaluate a drive from outside for the steps to come: for all of them in one call where the area's values take its place and so
        are kept anyway, else for a window. For the backward pass both are a step for each window."""
        drive = self.schedule.drives[t.drive]
        if (t.drive, t.position) not in self.terms:
            stop = max(self.window_end(t.drive, t.position), positions[-1] + 1)
            whole = self.recording and private and self.network.area(name).interaction is Interaction.ADDITIVE
            whole = whole and drive.connection.operator is not Operator.IDENTITY and self.linear[t.drive] is not None
            self.evaluate(t.drive, t.position, len(drive.slots) if whole else stop, note=not whole)
            if whole:
                self._at_once.add(t.drive)
        if t.drive in self._at_once and (t.position == 0 or self.window_end(t.drive, t.position - 1) == t.position):
            stop = max(self.window_end(t.drive, t.position), positions[-1] + 1)
            self.record_linear(t.drive, t.position, [self.form(drive, drive.slots[p]) for p in range(t.position, stop)])

    def is_plain_input(self, drive: Drive) -> bool:
        """Whether a drive reads the maps of an input as they are."""
        c = drive.connection
        resized = c.resize and tuple(self.network.shapes[drive.source][1:]) != self.network.read_size(c)
        return drive.source in self.inputs and c.pool is Pool.NONE and not resized

    def _private(self, t: Term, position: int | None = None) -> bool:
        """Whether nobody else reads a term's value."""
        identity = self.schedule.drives[t.drive].connection.operator is Operator.IDENTITY
        return not identity and self.uses[t.drive, t.position if position is None else position] == 1

    def _summable(self, t: Term) -> bool:
        if not self._private(t):
            return False
        drive = self.schedule.drives[t.drive]
        linear = self.linear_of(drive)
        return isinstance(linear, Dense) and linear.border is None and can_sum([linear])

    def _value(self, drive: int, position: int) -> View:
        if (drive, position) not in self.terms:
            self.evaluate(drive, position, position + 1)
        return self.terms[drive, position]
