"""Terms of a rollout on a tape: linear maps of its maps (:mod:`rnndyn_fast.graph.taped_maps`), and the ports of areas that they fill."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.again import Again
from rnndyn_fast.graph.area_rules import Port
from rnndyn_fast.graph.linear import DenseMap, LinearMap, linear_map
from rnndyn_fast.graph.schedule import Drive, Schedule, Term
from rnndyn_fast.graph.spec import Connection, Operator, Pool
from rnndyn_fast.graph.tape import Key, map_key, parted, stacked, term_key
from rnndyn_fast.graph.taped_maps import FEW_STEPS, Maps
from rnndyn_fast.ops.convolution import MAX_SUMMED, Weight, can_sum, convolve_sum
from rnndyn_fast.reference.rollout import Statistics, term

LARGE_PACKED = 2 << 20  # bytes of a packed weight

Reading = Tensor | Again | int  # what backward reads: a map that is kept, one that is made again, or the slot of an input


class Terms(Maps):
    """Of one rollout."""

    def __init__(
        self,
        schedule: Schedule,
        inputs: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        statistics: Statistics | None,
        engine: str,
        wanted: set[str],
    ) -> None:
        super().__init__(schedule, inputs, parameters, statistics, wanted)
        self.engine = engine
        self.terms: dict[tuple[int, int], Tensor] = {}
        self.linear: dict[int, LinearMap | None] = {}
        self._packed: dict[tuple[Any, ...], LinearMap | None] = {}
        self.keeps_packed = not self.tape.recording  # for the next rollout
        self.uses = Counter((t.drive, t.position) for terms in schedule.terms.values() for t in terms)
        self.uses_left = Counter(self.uses)
        self.ahead: set[int] = set()  # drives that are evaluated in windows
        self.postponed: set[int] = set()
        self.collected: defaultdict[int, list[tuple[list[Reading], list[Tensor]]]] = defaultdict(list)

    # ---------------------------------------------------------------- terms

    def linear_of(self, drive: Drive) -> LinearMap | None:
        """The linear map of a drive, prepared once; None: PyTorch computes the term, bias included."""
        if drive.index not in self.linear:
            c = drive.connection
            key = (c.operator, c.weights, c.stride, c.groups, c.concat, self.network.window(c), self.network.read_size(c))
            if key not in self._packed:
                self._packed[key] = linear_map(
                    self.network, c, self.tape.parameters, self.engine, self.samples, len(drive.slots), keep=self.keeps_packed
                )
            self.linear[drive.index] = self._packed[key]
        return self.linear[drive.index]

    def evaluate(self, index: int, first: int, last: int, out: Tensor | None = None) -> None:
        """Positions first..last-1 of a drive, in one call."""
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
            value = linear.forward(stacked([x for x, _ in forms]), out)
            self.terms.update(zip(positions, parted(value, len(slots)), strict=True))
            self._record_linear(index, first, forms)
        self._used_maps(drive, slots)

    def _reads_pooled(self, drive: Drive) -> bool:
        """Whether a drive reads a pooled form of its map, and not the map."""
        c = drive.connection
        return c.pool is not Pool.NONE and (c.operator is Operator.IDENTITY or self.linear_of(drive) is not None)

    def pool_early(self, name: str, slot: int) -> None:
        """Where components run one after another, what the next ones read pooled is pooled at once, so that the map can go."""
        if self.by_component:
            readers = [d for d in self.schedule.drives if d.source == name and slot in d.slots]
            for drive in readers:
                if self._reads_pooled(drive):
                    self.form(drive, slot)
                else:
                    self.whole_uses[name, slot] += 1
            if readers:
                self._drop_pooled(name, slot)

    def _used_maps(self, drive: Drive, slots: Sequence[int]) -> None:
        """Maps go with their last reader, but where components run one after another those that are recorded."""
        for slot in slots:
            self.map_uses[drive.source, slot] -= 1
            if not self.map_uses[drive.source, slot] and not (self.by_component and drive.source in self.recorded):
                self._drop(drive.source, slot)
            elif not self._reads_pooled(drive):
                self.whole_uses[drive.source, slot] -= 1
                self._drop_pooled(drive.source, slot)

    def _term_by_torch(self, drive: Drive, position: tuple[int, int], slot: int) -> None:
        c, state = drive.connection, self.state(drive.connection, drive.source)

        def function(xs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
            return [term(self.network, c, xs[0].permute(0, 3, 1, 2), parameters).permute(0, 2, 3, 1)]

        source = (map_key(drive.source, slot, state), self.map(drive.source, slot, state))
        (self.terms[position],) = self.tape.by_torch(function, [source], [term_key(*position)], [*c.weights, *c.biases])

    def _record_linear(self, index: int, first: int, forms: list[tuple[Tensor, Key]]) -> None:
        if not self.tape.recording:
            return
        drive = self.schedule.drives[index]
        weights = self.tape.wanted.intersection((*drive.connection.weights, *drive.connection.biases))
        if weights or drive.source in self.reaches:
            keys = [key for _, key in forms]
            slots = drive.slots[first : first + len(forms)]
            xs: list[Reading] = [*slots] if self._plain_input(drive) else [self.rules.again.reading(key, x) for x, key in forms]
            self.tape.record(self._linear_back, index, first, xs, keys, bool(weights))

    def _linear_back(self, index: int, first: int, xs: list[Reading], keys: list[Key], need_weight: bool) -> None:
        drive, linear = self.schedule.drives[index], self.linear.get(index)
        assert linear is not None
        found = [self.tape.grads.take(term_key(index, first + k))[0] for k in range(len(xs))]
        if all(grad is None for grad in found):
            return
        channels, height, width = drive.shape
        zero = torch.zeros((self.samples, height, width, channels), dtype=self.example.dtype) if any(g is None for g in found) else None
        grads = [zero if grad is None else grad for grad in found]
        if linear.postponed and need_weight and (index in self.postponed or self._waits(index)):
            # (What is made again is made now: later the way back has gone past what it is made from.)
            self.collected[index].append(([x if isinstance(x, int) else self.rules.again.read(x) for x in xs], grads))  # type: ignore[arg-type]
            need_weight = False
            if self._collected_slots(index) >= self.window(drive.connection.target) and self._is_due(index):
                self.weights_back((index,))
        need_x = drive.source in self.reaches
        if need_x or need_weight:
            x = self._read(drive, xs, shape_only=not need_weight)
            into = self.tape.grads.own(keys[0]) if need_x and len(keys) == 1 else None
            grad = stacked(grads)  # type: ignore[arg-type]
            grad_x, found_weights = linear.backward(
                x, grad, need_x=need_x, need_weight=need_weight, into=into, sums=self.tape.own_parameter
            )
            for name, grad_weight in found_weights:
                self.tape.add_parameter(name, grad_weight, own=True)
            if grad_x is not None and grad_x is not into:
                for key, part in zip(keys, parted(grad_x, len(keys)), strict=True):
                    self.tape.grads.add(key, part, own=True)
            if self.network.delay(drive.connection) > 0 and self.window(drive.source) == 1:
                self.rules.again.forget(keys)
                self.blocks.pop((drive.source, "again None"), None)
        if linear.dense is not None and (self._packs_for_each(drive, linear.dense) or (
            first == 0 and sum(other is linear for other in self.linear.values()) == 1
        )):  # fmt: skip
            linear.dense.drop_packed()  # (of the last step: what is left is its weight's gradient)

    def _packs_for_each(self, drive: Drive, weight: Weight) -> bool:
        """Whether the way back packs a weight for each time step: a large one, beside others, that few steps read."""
        return (
            len(drive.slots) <= FEW_STEPS
            and weight.packed_bytes >= LARGE_PACKED
            and len(self.schedule.components[self.component_of[drive.connection.target]].drives_within) > 1
        )

    def _read(self, drive: Drive, xs: Sequence[Reading], *, shape_only: bool = False) -> Tensor:
        """What a drive read, [len(xs) * N, H, W, C]; where only its shape matters, perhaps with any values."""
        if shape_only and not isinstance(xs[0], Tensor):
            channels, (height, width) = self.network.shapes[drive.source][0], self.network.read_size(drive.connection)
            return self.example.new_empty(1).expand(len(xs) * self.samples, height, width, channels)
        if isinstance(xs[0], int):
            return self.shown(drive.source, xs)  # type: ignore[arg-type]
        return stacked([self.rules.again.read(x) for x in xs if not isinstance(x, int)])

    def component_back(self, drives: Sequence[int], areas: Sequence[str]) -> None:
        """At the first step of a component: packed weights are not read any more, and the rest of the weights' gradients is taken."""
        self.tidy()
        self.drop_blocks(areas)
        for index in drives:
            linear = self.linear.get(index)
            if linear is not None and linear.dense is not None:
                linear.dense.drop_packed()
        self.weights_back([index for index in drives if self._is_due(index)])

    def _collected_slots(self, index: int) -> int:
        return sum(len(some) for some, _ in self.collected.get(index, ()))

    def _is_due(self, index: int) -> bool:
        """Whether a weight's gradient is there already, or would take no more memory than the maps that it is made of; else it waits for
        more of them, or for the end of the way back."""
        linear = self.linear.get(index)
        if linear is None or linear.dense is None:
            return True
        there = self.tape.own_parameter(self.schedule.drives[index].connection.weights[-1]) is not None
        return there or self._elements(index) * self._collected_slots(index) >= linear.dense.weight.numel()

    def _elements(self, index: int) -> int:
        """Of the maps that a drive reads and makes at one slot."""
        drive = self.schedule.drives[index]
        height, width = self.network.read_size(drive.connection)
        return self.samples * (height * width * self.network.shapes[drive.source][0] + math.prod(drive.shape))

    def _waits(self, index: int) -> bool:
        """Whether a weight's gradient waits for the end of the way back, whatever is collected of its maps (:meth:`_is_due`)."""
        linear = self.linear.get(index)
        slots = len(self.schedule.drives[index].slots)
        return linear is not None and linear.dense is not None and self._elements(index) * slots < linear.dense.weight.numel()

    def weights_back(self, drives: Sequence[int]) -> None:
        """The gradients of weights within a component, over a window of its steps, or what is left."""
        for index in drives:
            pairs = self.collected.pop(index, [])[::-1]
            if pairs:
                self.tidy()
                linear = self.linear[index]
                assert linear is not None
                xs = [x for some, _ in pairs for x in some]
                grads = [grad for _, some in pairs for grad in some]
                x = self._read(self.schedule.drives[index], xs)
                _, found = linear.backward(x, stacked(grads), need_x=False, need_weight=True, sums=self.tape.own_parameter)
                for name, grad in found:
                    self.tape.add_parameter(name, grad, own=True)

    # ---------------------------------------------------------------- areas

    def ports(self, name: str, slots: range) -> dict[str, Port]:
        """The terms that enter an area, evaluated where they are not yet."""
        area = self.network.area(name)
        ports = {port: Port() for port in area.ports}
        entering: dict[str, list[Term]] = {port: [] for port in area.ports}
        for t in self.schedule.terms[name, slots[0]]:
            entering[self.network.port(t.connection)].append(t)
        for port_name, terms in entering.items():
            self._fill(name, slots, port_name, terms, ports[port_name])
        for c in self.schedule.zeros[name, slots[0]]:
            port = ports[self.network.port(c)]
            if c.output_bias is not None:
                port.biases.append(c.output_bias)
            if not port.values or (c.middle_bias and c.middle_channels is not None):
                self._zero_term(c, len(slots), port)
        return ports

    def _zero_term(self, c: Connection, count: int, port: Port) -> None:
        channels, height, width = self.network.term_shape(c)
        value = torch.zeros((count * self.samples, height, width, channels), dtype=self.example.dtype)
        keys: list[Key] = [None] * count
        if c.middle_bias and c.middle_channels is not None:
            # What is between is its bias, everywhere.
            names = (c.weights[1], c.biases[0])
            constant = ("constant", c.label, id(port))
            (value,) = self.tape.by_torch(
                lambda xs, p: [xs[0] + (p[names[0]].flatten(1) @ p[names[1]])], [(None, value)], [constant], names
            )
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
                self.evaluate(t.drive, t.position, self._window_end(t.drive, t.position))
        fresh = [t for t in terms if (t.drive, t.position) not in self.terms and self._summable(t)] if kernel else []
        summed: list[Term] = []
        if len(slots) == 1 and len(fresh) == 1 and not any((t.drive, t.position) in self.terms and self._private(t) for t in terms):
            out = self.room(name, slots, place, self.schedule.drives[fresh[0].drive].shape[0])
            self.evaluate(fresh[0].drive, fresh[0].position, fresh[0].position + 1, out)
        elif len(slots) == 1 and 2 <= len(fresh) <= MAX_SUMMED:
            maps = [m for t in fresh if isinstance(m := self.linear[t.drive], DenseMap)]
            if can_sum([m.weight for m in maps]):
                summed = fresh
                out = self.room(name, slots, place, self.schedule.drives[fresh[0].drive].shape[0])
                forms = [self.form(drive := self.schedule.drives[t.drive], drive.slots[t.position]) for t in summed]
                convolve_sum([m.weight for m in maps], [x for x, _ in forms], out)
                for t, form in zip(summed, forms, strict=True):
                    self._record_linear(t.drive, t.position, [form])
                    drive = self.schedule.drives[t.drive]
                    self._used_maps(drive, [drive.slots[t.position]])
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
                    port.values.insert(0, stacked(parts))
                    port.private = True
                else:
                    port.values.append(stacked(parts))
                if identity and len(terms) == 1 and self._plain_input(drive):
                    port.again = partial(self.shown, drive.source, [drive.slots[p] for p in positions])
            if identity:
                keys.append([self._form_keys[t.drive, drive.slots[p]] if drive.source in self.reaches else None for p in positions])
            else:
                keys.append([term_key(t.drive, p) for p in positions])
            port.connections.append(t.connection)
            if t.connection.output_bias is not None and self.linear.get(t.drive, True) is not None:
                port.biases.append(t.connection.output_bias)
        port.keys = keys

    def _plain_input(self, drive: Drive) -> bool:
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
        return isinstance(linear, DenseMap) and linear.border is None and can_sum([linear.weight])

    def _value(self, drive: int, position: int) -> Tensor:
        if (drive, position) not in self.terms:
            self.evaluate(drive, position, position + 1)
        self.uses_left[drive, position] -= 1
        if self.uses_left[drive, position]:
            return self.terms[drive, position]
        return self.terms.pop((drive, position))
