"""From a schedule to the instructions of its forward pass, and notes of what was done for the backward pass.

Where gradients are wanted, components run one after another: drives into a component are one call over all their slots, and so are the
gradients of weights. Without gradients it goes time step by time step. What no kernel computes (:mod:`rnndyn_fast.program.linear`,
:mod:`rnndyn_fast.program.areas`), PyTorch does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rnndyn_fast.graph.schedule import Component, Drive
from rnndyn_fast.graph.spec.network import Operator, pooled_shape
from rnndyn_fast.ops.winograd_conv import WinogradMap
from rnndyn_fast.program.areas import Slots
from rnndyn_fast.program.ir import Role, Shape, View
from rnndyn_fast.program.linear import Dense
from rnndyn_fast.program.maps import Key, SlotBlock, map_key
from rnndyn_fast.program.terms import Terms

_MANY_TILES = 64  # of a time step, from which on Winograd's weights are read often enough: terms are then summed step by step

LARGE_MAP = 1 << 20  # bytes, from which on the first components of an inference take some samples at a time

MUCH_PACKED = 24 << 20  # bytes of packed weights that inference component by component must save: it packs them anew every time


@dataclass(frozen=True)
class ComponentStep:
    """A component began. ``drives``: those whose weights' gradients wait for its windows."""

    drives: tuple[int, ...]
    areas: tuple[str, ...]


class Lowering(Terms):
    """One rollout: areas in their order, and recorded states."""

    def result(self, name: str, shape: Shape, dtype: torch.dtype) -> View:
        """A new tensor of the caller's."""
        return self.b.external(Role.RESULT, name, tuple(shape), dtype)

    def update(self, name: str, slots: range) -> None:
        """Some slots of an area."""
        step = self.schedule.slot_of[name].index(slots[0])
        states = self.rules.update(Slots(self.network.area(name), slots, step), self.ports(name, slots))
        for state, value in states.items():
            for slot, part in zip(slots, value.parts(len(slots)), strict=True):
                self.maps[map_key(name, slot, state)] = part
        for slot in slots:
            self.pool_early(name, slot)

    # ---------------------------------------------------------------- order

    def _deferred(self, component: Component) -> set[int]:
        """Drives from outside that are rather summed, step by step, with convolutions from within: in the Winograd domain, and with
        so many tiles that reading weights at every step costs little."""
        found: set[int] = set()
        for d in component.drives_in:
            drive = self.schedule.drives[d]
            if not self._winograd(drive) or any(self.uses[d, k] != 1 for k in range(len(drive.slots))):
                continue
            readers = [(item, t) for item in component.updates for t in self.schedule.terms[item] if t.drive == d]
            partners = [
                any(
                    o.drive in component.drives_within and self._winograd(self.schedule.drives[o.drive])
                    and self.network.port(o.connection) == self.network.port(t.connection)
                    for o in self.schedule.terms[item]
                )
                for item, t in readers
            ]  # fmt: skip
            if sum(partners) >= max(1, len(partners) - 1) and len(readers) == len(drive.slots):
                found.add(d)
        return found

    def _winograd(self, drive: Drive) -> bool:
        linear = None if drive.connection.operator is Operator.IDENTITY else self.linear_of(drive)
        if not isinstance(linear, Dense) or not isinstance(linear.choice.map, WinogradMap):
            return False
        _, height, width = pooled_shape(self.network.shapes[drive.source], drive.connection.pool)
        return self.samples * linear.choice.map.tiles(height, width) >= _MANY_TILES

    def run(self, numbers: range) -> None:
        """Some components, one after another."""
        for number in numbers:
            component = self.schedule.components[number]
            waits = any(self.rules.area_steps.takes(self.network.area(name)) for name in component.areas)
            deferred = self._deferred(component) if component.recurrent and not waits else set()
            self.ahead = {d for d in component.drives_in if d not in deferred and not self.schedule.drives[d].static}
            together = tuple({*component.drives_within, *deferred})
            self.postponed |= set(together)
            self.record(ComponentStep(together, component.areas))
            if component.batched and len(component.updates) > 1 and not self.schedule.zeros[component.updates[0]]:
                for slots in self.windows(component.areas[0]):
                    self.update(component.areas[0], slots)
            else:
                for name, slot in component.updates:
                    self.update(name, range(slot, slot + 1))
            self.drop_blocks(component.areas)
            self._drop_read(number)

    def _drop_read(self, number: int) -> None:
        """Give up the weights packed for a component, but those that a later one reads."""
        components, drives = self.schedule.components, self.schedule.drives
        later = {drives[d].connection.weights for c in components[number + 1 :] for d in (*c.drives_in, *c.drives_within)}
        for d in (*components[number].drives_in, *components[number].drives_within):
            linear = self.linear.get(d)
            if linear is not None and linear.dense is not None and drives[d].connection.weights not in later:
                linear.dense.drop_packed(forward_only=True)

    def _choose_order(self) -> None:
        """Without gradients: one component after another where that saves much memory of packed weights, which then are not kept."""
        if self.recording:
            return
        packed: list[dict[int, int]] = []
        for component in self.schedule.components:
            linear = [self.linear_of(d) for i in (*component.drives_in, *component.drives_within)
                      if (d := self.schedule.drives[i]).connection.operator is not Operator.IDENTITY]  # fmt: skip
            packed.append({id(m.dense): m.dense.packed_bytes for m in linear if m is not None and m.dense is not None})
        every = {key: nbytes for one in packed for key, nbytes in one.items()}
        self.by_component = sum(every.values()) - max(sum(one.values()) for one in packed) > MUCH_PACKED
        self.keeps_packed = not self.by_component
        for found in self.packed.values():
            if found is not None and found.dense is not None and self.by_component:
                found.dense.keep = False

    # ---------------------------------------------------------------- some samples at a time

    def _large(self) -> int:
        """How many components come first, in inference component by component, whose maps are large and not recorded: they run some
        samples at a time, as samples have nothing to do with each other there."""
        components = self.schedule.components
        if self.recording or self.setting.training or self.some == self.samples:
            return 0
        return next((n for n, c in enumerate(components) if self.recorded & set(c.areas) or self._bytes(c) * self.samples <= LARGE_MAP
                     or any(getattr(self.network.area(name).cell, "by_sample", False) for name in c.areas)), 0)  # fmt: skip

    def _bytes(self, component: Component) -> int:
        """Of the largest map of one sample."""
        return max(math.prod(self.network.shapes[name]) for name in component.areas) * self.dtype.itemsize

    @property
    def some(self) -> int:
        """Samples at a time: as many as large maps have room for."""
        return min(self.samples, max(1, LARGE_MAP // self._bytes(self.schedule.components[0])))

    def _run_large(self, count: int) -> None:
        """The first components, some samples at a time; what later ones read of them is here then."""
        drives = self.schedule.drives
        own = {name for component in self.schedule.components[:count] for name in component.areas}
        inside = {d for component in self.schedule.components[:count] for d in (*component.drives_in, *component.drives_within)}
        for first in range(0, self.samples, self.some):
            last = min(first + self.some, self.samples)
            inputs = {name: x.narrow(1 if self.nodes[name].frames else 0, first, last) for name, x in self.inputs.items()}
            part = Lowering(self.b, self.schedule, inputs, self.parameters, replace(self.setting, samples=last - first))
            part.by_component, part.keeps_packed = True, False
            part.run(range(count))
            for drive in drives:
                if drive.source in own and drive.index not in inside:
                    for slot in drive.slots:
                        x, key = part.form(drive, slot)
                        known = self.maps if key is not None and key[0] == "map" else self.forms
                        if key not in known:
                            known[key] = self.b.new((self.samples, *x.shape[1:]), x.dtype, f"{drive.source} of all samples")
                        self.b.emit("copy", x=x, out=known[key].rows(first, last))

    # ---------------------------------------------------------------- states

    def lower(self) -> list[View]:
        """Emit the forward pass. Returns the recorded states, [T', N, H, W, C] each."""
        schedule = self.schedule
        found = {name: self._place_of(name) for name in schedule.record}
        self._choose_order()
        if self.by_component:
            large = self._large()
            if large:
                self._run_large(large)
            self.run(range(large, len(schedule.components)))
        steps: defaultdict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)  # of an area's slot, those of what is recorded
        for name in found:
            area = self.network.recorded(name)[0]
            for t, slot in enumerate(schedule.slot_of[area][schedule.first_step[name] :]):
                steps[area, slot].append((name, t))
        for area, slot in schedule.time_major:
            if not self.by_component:
                self.update(area, range(slot, slot + 1))
            for name, t in steps[area, slot]:
                value, out = self.maps[self.recorded_key(name, slot)], found[name][t]
                if not out.same_place(value):
                    self.b.emit("copy", x=value, out=out)
        return list(found.values())

    def _place_of(self, name: str) -> View:
        """Of recorded states, [T', N, H, W, C]. Where every step has a slot of its own they are written there right away: autograd sees to
        it that nobody changes them before backward."""
        key = self.recorded_key(name, 0)
        assert key is not None
        channels, height, width = self.network.shapes[key[1]]
        steps = self.schedule.slot_of[key[1]][self.schedule.first_step[name] :]
        found = self.result(name, (len(steps), self.samples, height, width, channels), self.dtype)
        if steps == list(range(self.schedule.num_slots[key[1]])):
            self.whole.setdefault((key[1], f"state {key[3]}"), SlotBlock(found))
        return found

    def recorded_key(self, name: str, slot: int) -> Key:
        """Of a recorded state."""
        area, state = self.network.recorded(name)
        return map_key(area, slot, state if state is not None else self.network.area(area).states[0])

    # ---------------------------------------------------------------- what later passes may use

    def prepared(self) -> list[tuple[Any, dict[str, Any]]]:
        """What is known of weights and biases in other layouts, to be put back by :meth:`restore`."""
        linear = [m for m in self.packed.values() if m is not None]
        parts = [part for m in linear for part in (m, getattr(m, "first", None), getattr(m, "second", None)) if part is not None]
        owners: Sequence[Any] = [self, self.rules, self.rules.area_steps, *parts]
        names = ("_views", "_packed", "_turned", "_layout", "_pointwise", "_prepared", "_bias_rows", "_affine", "blocks")
        return [
            (owner, {name: dict(v) if isinstance(v, dict) else v for name in names if (v := getattr(owner, name, self)) is not self})
            for owner in owners
        ]

    @staticmethod
    def restore(prepared: list[tuple[Any, dict[str, Any]]]) -> None:
        """Undo what a pass added."""
        for owner, known in prepared:
            for name, value in known.items():
                setattr(owner, name, value)
