"""Forward execution of a schedule, in two orders.

:func:`forward_training` takes one component after another and keeps, in stacked buffers [slots, N, H, W, C], what backward needs.
:func:`forward_inference` takes one time step after another and drops every map after its last reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.operands import Operands, empty_form
from rnndyn_fast.graph.saved import POOL_KIND, has_modulator, keeps_value, recomputes_state, saved_buffers
from rnndyn_fast.graph.schedule import AreaSlot, Component, Drive, Schedule, Term
from rnndyn_fast.graph.spec import Norm, Operator, Pool
from rnndyn_fast.graph.update import Pending, Value, update_area
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.convolution import can_wait, convolve


def _hwc(schedule: Schedule, name: str) -> tuple[int, int, int]:
    channels, height, width = schedule.network.shapes[name]
    return height, width, channels


def _outputs(operands: Operands) -> list[Tensor]:
    """Buffers [T', N, H, W, C] for the recorded areas."""
    schedule = operands.schedule
    return [
        empty((schedule.timesteps - schedule.first_step[name], operands.samples, *_hwc(schedule, name)), operands.dtype)
        for name in schedule.record
    ]


def as_states(output: Tensor) -> Tensor:
    """A buffer [T', N, H, W, C] seen as [T', N, C, H, W]."""
    return output.permute(0, 1, 4, 2, 3)


# ---------------------------------------------------------------- training


class _Training:
    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.schedule = operands.schedule
        self.kept = {b.key for b in saved_buffers(self.schedule)}
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self.drives: dict[int, Tensor] = {}  # [positions, N, H, W, C]
        self.states: dict[AreaSlot, Tensor] = {}  # those that backward computes again, [N, H, W, C]
        self.passing: dict[AreaSlot, int] = {}  # their readers still to come
        self.in_place: dict[str, int] = {}  # area -> the drive in whose memory its value is written
        self.uses = Counter(t.drive for terms in self.schedule.terms.values() for t in terms)
        self.within: dict[tuple[int, int], Tensor] = {}  # terms from within a component that are still to be read again
        self.reads_left = Counter((t.drive, t.position) for terms in self.schedule.terms.values() for t in terms)
        for node in self.schedule.network.inputs:
            if self.schedule.num_slots[node.name]:
                self._ingest(node.name)

    def _ingest(self, name: str) -> None:
        node = next(n for n in self.schedule.network.inputs if n.name == name)
        slots = range(self.schedule.timesteps) if node.frames else range(1)
        for pool in self.schedule.pools_read(name):
            forms = [self.operands.ingest(node, pool, slot) for slot in slots]
            self.buffers[name, POOL_KIND[pool]] = torch.stack([f for f, _ in forms]) if len(forms) > 1 else forms[0][0][None]
            if pool is Pool.MAX:
                self.buffers[name, "argmax"] = torch.stack([a for _, a in forms if a is not None])

    def run(self) -> None:
        for component in self.schedule.components:
            for d in component.drives_in:
                if d not in self.drives and not self._with_update(d, component):
                    self.drives[d] = self._evaluate(self.schedule.drives[d], 0, len(self.schedule.drives[d].slots))
            for name in component.areas:
                self._allocate(name, component)
            if component.batched:
                self._update(component.areas[0], 0, self.schedule.num_slots[component.areas[0]])
            else:
                for name, slot in component.updates:
                    self._update(name, slot, slot + 1)

    def _with_update(self, index: int, component: Component) -> bool:
        """Whether a drive from outside is computed together with its area's one update, which alone reads it."""
        drive = self.schedule.drives[index]
        once = drive.connection.operator is not Operator.IDENTITY and self.uses[index] == len(drive.slots)
        return component.batched and once and (f"drive{index}", "drive") not in self.kept

    def _pending(self, drive: Drive, first: int, last: int) -> Value:
        """Positions first..last-1 of a drive, [positions * N, H, W, C]; its linear map, if it has one, still to be computed."""
        if drive.connection.pool is Pool.NONE and (drive.source, drive.slots[first]) in self.states:
            x = self._passing_state(drive.source, drive.slots[first])
        else:
            x = stacked(self.buffers[drive.source, POOL_KIND[drive.connection.pool]], drive.slots[first:last]).flatten(0, 1)
        weight = self.operands.weights[drive.index]
        return x if weight is None else Pending(weight, x)

    def _evaluate(self, drive: Drive, first: int, last: int) -> Tensor:
        """Positions first..last-1 of a drive: [positions, N, H, W, C]."""
        value = self._pending(drive, first, last)
        y = convolve(value.weight, value.x) if isinstance(value, Pending) else value
        return y.unflatten(0, (last - first, -1))

    def _allocate(self, name: str, component: Component) -> None:
        schedule, dtype, samples = self.schedule, self.operands.dtype, self.operands.samples
        slots, shape = schedule.num_slots[name], _hwc(schedule, name)
        for pool in schedule.pools_read(name):
            if pool is Pool.NONE and recomputes_state(schedule, name):
                self.passing.update({(name, slot): n for slot in range(slots) if (n := self._readers_within(name, slot))})
                continue
            form, argmax = empty_form((slots, samples, *shape), pool, dtype)
            self.buffers[name, POOL_KIND[pool]] = form
            if argmax is not None:
                self.buffers[name, "argmax"] = argmax
        if schedule.network.area(name).norm is Norm.LAYER:
            self.buffers[name, "centre"] = empty((slots, samples), self.operands.sums_dtype)
            self.buffers[name, "rstd"] = empty((slots, samples), self.operands.sums_dtype)
        if keeps_value(schedule, name):
            in_place = self._private_drive(name, component)
            if in_place is None:
                self.buffers[name, "value"] = empty((slots, samples, *shape), dtype)
            else:
                self.in_place[name] = in_place
                self.buffers[name, "value"] = self.drives[in_place]
        elif schedule.network.area(name).norm is Norm.LAYER:
            scratch = slots if component.batched else 1
            self.buffers[name, "scratch"] = empty((scratch, samples, *shape), dtype)
        if has_modulator(schedule, name):
            self.buffers[name, "modulator"] = empty((slots, samples, *shape), dtype)

    def _readers_within(self, name: str, slot: int) -> int:
        return sum(d.source == name and d.connection.pool is Pool.NONE and slot in d.slots for d in self.schedule.drives)

    def _passing_state(self, name: str, slot: int) -> Tensor:
        """A state that backward computes again: [N, H, W, C]. It goes with its last reader."""
        state = self.states[name, slot]
        self.passing[name, slot] -= 1
        if not self.passing[name, slot]:
            del self.states[name, slot]
        return state

    def _private_drive(self, name: str, component: Component) -> int | None:
        """A convolution that only this area reads, position k at slot k: the area's value may take its place in memory."""
        slots = self.schedule.num_slots[name]
        for d in component.drives_in:
            if d not in self.drives:
                continue
            drive = self.schedule.drives[d]
            read_here = [t for s in range(slots) for t in self.schedule.terms[name, s] if t.drive == d and t.position == s]
            if drive.connection.operator is not Operator.IDENTITY and len(drive.slots) == slots == len(read_here) == self.uses[d]:
                return d
        return None

    def _term_value(self, term: Term, slots: slice) -> Value:
        batched = slots.stop - slots.start > 1
        if term.drive in self.drives:
            return self.drives[term.drive][slots if batched else slice(term.position, term.position + 1)].flatten(0, 1)
        drive, use = self.schedule.drives[term.drive], (term.drive, term.position)
        if batched:
            return self._pending(drive, 0, len(drive.slots))
        self.reads_left[use] -= 1
        value: Value | None = self.within.pop(use, None)
        if value is None:
            value = self._pending(drive, term.position, term.position + 1)
            key = (f"drive{drive.index}", "drive")
            if isinstance(value, Pending) and key in self.kept:  # a drive of a product, from within the component
                if key not in self.buffers:
                    channels, height, width = drive.shape
                    self.buffers[key] = empty((len(drive.slots), self.operands.samples, height, width, channels), self.operands.dtype)
                value = convolve(value.weight, value.x, self.buffers[key][term.position])
            elif isinstance(value, Pending) and self.reads_left[use]:
                value = convolve(value.weight, value.x)
        if self.reads_left[use]:
            assert isinstance(value, Tensor)
            self.within[use] = value
        return value

    def _update(self, name: str, first: int, last: int) -> None:
        operands, area, slots = self.operands, self.operands.areas[name], slice(first, last)
        drives, modulators = operands.split_terms(self.schedule.terms[name, first])

        def buffer(kind: str, where: slice = slots) -> Tensor | None:
            stack = self.buffers.get((name, kind))
            return None if stack is None else stack[where].flatten(0, 1)

        value = buffer("value")
        scratch = buffer("scratch", slice(0, last - first))
        drives.sort(key=lambda t: t.drive != self.in_place.get(name))  # the term whose memory the value takes must be the first
        values = [self._term_value(t, slots) for t in drives]
        state = buffer("state")
        if (name, first) in self.passing:
            state = self.states[name, first] = empty((operands.samples, *_hwc(self.schedule, name)), operands.dtype)
        modulator_sum = buffer("modulator")
        if modulator_sum is not None and not modulators:
            modulator_sum.fill_(1)
        update_area(
            area,
            values,
            [self._term_value(t, slots) for t in modulators],
            operands.bias(drives),
            operands.bias(modulators),
            value if value is not None else scratch,
            buffer("centre"),
            buffer("rstd"),
            modulator_sum if modulators else None,
            state=state,
            max_pooled=buffer("max"),
            argmax=buffer("argmax"),
            mean_pooled=buffer("mean"),
        )


def stacked(form: Tensor, slots: Sequence[int]) -> Tensor:
    """Some slots of a stacked buffer [slots, N, ...]: a view where they are adjacent, else a copy."""
    if list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return form[slots[0] : slots[0] + len(slots)]
    return torch.stack([form[slot] for slot in slots])  # (an index would be copied to the device)


def forward_training(operands: Operands) -> tuple[list[Tensor], list[Tensor]]:
    """Run a rollout and keep what backward needs.

    Returns: the recorded areas, [T', N, C, H, W] each, and the buffers of :func:`saved_buffers`, in its order.
    """
    schedule = operands.schedule
    run = _Training(operands)
    run.run()
    outputs = _outputs(operands)
    for name, output in zip(schedule.record, outputs, strict=True):
        for t in range(schedule.first_step[name], schedule.timesteps):
            output[t - schedule.first_step[name]] = run.buffers[name, "state"][schedule.slot_of[name][t]]
    saved = []
    for b in saved_buffers(schedule):
        saved.append(run.drives[int(b.owner[5:])] if b.kind == "drive" and b.key not in run.buffers else run.buffers[b.key])
    return [as_states(o) for o in outputs], saved


# ---------------------------------------------------------------- inference


class _Inference:
    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.schedule = operands.schedule
        self.forms: dict[tuple[str, int, Pool], Tensor] = {}
        self.drives: dict[tuple[int, int], Tensor] = {}
        self.free: dict[tuple[int, ...], list[Tensor]] = {}  # maps of ours that may be written again
        self.drive_uses = Counter((t.drive, t.position) for terms in self.schedule.terms.values() for t in terms)
        # Readers of each form of a map: drives still to be evaluated (an identity drive: still to be used up).
        self.form_uses = Counter((d.source, slot, d.connection.pool) for d in self.schedule.drives for slot in d.slots)
        self.inputs = {node.name: node for node in self.schedule.network.inputs}

    def _map(self, shape: tuple[int, ...]) -> Tensor:
        pool = self.free.get(shape)
        return pool.pop() if pool else empty(shape, self.operands.dtype)

    def _release(self, tensor: Tensor) -> None:
        self.free.setdefault(tuple(tensor.shape), []).append(tensor)

    def _form(self, drive: Drive, slot: int) -> Tensor:
        key = (drive.source, slot, drive.connection.pool)
        if key not in self.forms and drive.source in self.inputs:
            self.forms[key], _ = self.operands.ingest(self.inputs[drive.source], drive.connection.pool, slot)
        return self.forms[key]

    def _used_form(self, drive: Drive, slot: int) -> None:
        """One reader less of a form; after the last one its memory is free."""
        key = (drive.source, slot, drive.connection.pool)
        self.form_uses[key] -= 1
        if self.form_uses[key] == 0:
            tensor = self.forms.pop(key)
            if drive.source not in self.inputs and not (drive.source in self.schedule.record and drive.connection.pool is Pool.NONE):
                self._release(tensor)

    def _term_value(self, term: Term) -> Value:
        key = (term.drive, term.position)
        drive = self.schedule.drives[term.drive]
        slot = drive.slots[term.position]
        weight = self.operands.weights[term.drive]
        if weight is None:
            return self._form(drive, slot)
        if key not in self.drives:
            if self.drive_uses[key] == 1 and can_wait(weight):
                return Pending(weight, self._form(drive, slot))
            self.drives[key] = convolve(weight, self._form(drive, slot))
            self._used_form(drive, slot)
        return self.drives[key]

    def _used_term(self, term: Term) -> None:
        key = (term.drive, term.position)
        drive = self.schedule.drives[term.drive]
        self.drive_uses[key] -= 1
        if self.drive_uses[key] == 0:
            if drive.connection.operator is Operator.IDENTITY:
                self._used_form(drive, drive.slots[term.position])
            self.drives.pop(key, None)

    def _room_of_value(
        self, shape: tuple[int, ...], drives: Sequence[Term], values: Sequence[Value], modulating: Sequence[Value]
    ) -> tuple[Tensor, bool]:
        """Where an area's value goes: over a drive that nobody reads again, or to a map of our own, for the time of this call (True)."""
        if not any(isinstance(v, Pending) for v in (*values, *modulating)):
            for t, v in zip(drives, values, strict=True):
                last = t.connection.operator is not Operator.IDENTITY and self.drive_uses[t.drive, t.position] == 1
                if last and isinstance(v, Tensor):
                    return v, False
        return self._map(shape), True

    def update(self, name: str, slot: int, state: Tensor | None) -> None:
        """Compute one slot of an area; ``state`` is where it is recorded, if it is."""
        schedule, operands, area = self.schedule, self.operands, self.operands.areas[name]
        shape = (operands.samples, *_hwc(schedule, name))
        drives, modulators = operands.split_terms(schedule.terms[name, slot])
        values, modulating = [self._term_value(t) for t in drives], [self._term_value(t) for t in modulators]
        value: Tensor | None = None
        mean: Tensor | None = None
        rstd: Tensor | None = None
        ours = False
        if area.gamma is not None:
            value, ours = self._room_of_value(shape, drives, values, modulating)
            mean, rstd = empty((2, operands.samples), operands.sums_dtype).unbind()
        for term, v in zip((*drives, *modulators), (*values, *modulating), strict=True):
            if isinstance(v, Pending):  # what it reads may be overwritten by the area's outputs, which are written last
                drive = schedule.drives[term.drive]
                self._used_form(drive, drive.slots[term.position])
        if value is not None and not ours:
            values.sort(key=lambda v: v is not value)  # the term whose memory the value takes must be the first
        outputs: dict[str, Any] = {"state": state}
        for pool in schedule.pools_read(name):
            form = (name, slot, pool)
            if self.form_uses[form] == 0:
                continue
            if pool is Pool.NONE and state is not None:
                self.forms[form] = state
            else:
                self.forms[form] = self._map(_form_shape(shape, pool))
            outputs[{Pool.NONE: "state", Pool.MAX: "max_pooled", Pool.MEAN: "mean_pooled"}[pool]] = self.forms[form]
        update_area(
            area,
            values,
            modulating,
            operands.bias(drives),
            operands.bias(modulators),
            value,
            mean,
            rstd,
            **outputs,
        )
        if value is not None and ours:
            self._release(value)
        for term in (*drives, *modulators):
            self._used_term(term)


def _form_shape(shape: tuple[int, ...], pool: Pool) -> tuple[int, ...]:
    n, h, w, c = shape
    return {Pool.NONE: shape, Pool.MAX: (n, h // 2, w // 2, c), Pool.MEAN: (n, 1, 1, c)}[pool]


def forward_inference(operands: Operands) -> list[Tensor]:
    """Run a rollout holding two time steps of state. Returns the recorded areas, [T', N, C, H, W] each."""
    schedule = operands.schedule
    outputs = _outputs(operands)
    recorded = dict(zip(schedule.record, outputs, strict=True))
    run = _Inference(operands)
    for name, slot in schedule.time_major:
        where = None
        if name in recorded:
            where = recorded[name][schedule.slot_of[name].index(slot) - schedule.first_step[name]]
        run.update(name, slot, where)
    for name, output in recorded.items():
        slots = schedule.slot_of[name][schedule.first_step[name] :]
        for k, slot in enumerate(slots):
            if slots.index(slot) != k:
                output[k] = output[slots.index(slot)]
    return [as_states(o) for o in outputs]
