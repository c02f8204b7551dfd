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

from rnndyn_fast.graph.operands import Operands, form_shape
from rnndyn_fast.graph.saved import POOL_KIND, SavedBuffer, keeps_value, modulated_slots, saved_buffers
from rnndyn_fast.graph.schedule import Component, Drive, FormSlot, Schedule, Term
from rnndyn_fast.graph.spec import Norm, Operator, Pool
from rnndyn_fast.graph.update import Pending, Value, update_area
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.convolution import can_wait, convolve
from rnndyn_fast.ops.recording import empty_result


def _hwc(schedule: Schedule, name: str) -> tuple[int, int, int]:
    channels, height, width = schedule.network.shapes[name]
    return height, width, channels


def _outputs(operands: Operands) -> list[Tensor]:
    """Buffers [T', N, H, W, C] for the recorded areas."""
    schedule = operands.schedule
    return [
        empty_result((schedule.timesteps - schedule.first_step[name], operands.samples, *_hwc(schedule, name)), operands.dtype)
        for name in schedule.record
    ]


def as_states(output: Tensor) -> Tensor:
    """A buffer [T', N, H, W, C] seen as [T', N, C, H, W]."""
    return output.permute(0, 1, 4, 2, 3)


# ---------------------------------------------------------------- training


class Training:
    """A rollout, or the first components of one, that leaves the buffers ``kept`` behind."""

    def __init__(self, operands: Operands, components: Sequence[Component], kept: Sequence[SavedBuffer]) -> None:
        self.operands = operands
        self.schedule = operands.schedule
        self.components = components
        self.kept = {b.key for b in kept}
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self.drives: dict[int, Tensor] = {}  # [positions, N, H, W, C]
        self.forms: dict[FormSlot, Tensor] = {}  # those that only their component reads and backward computes again, [N, H, W, C]
        self.passing: dict[FormSlot, int] = {}  # their readers still to come
        self.unread = Counter((d.source, d.connection.pool) for d in self.schedule.drives)  # forms: drives still to be evaluated
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

    def run(self) -> dict[tuple[str, str], Tensor]:
        """Returns all buffers that are left."""
        for component in self.components:
            for d in component.drives_in:
                if d not in self.drives and not self._with_update(d, component):
                    self.drives[d] = self._evaluate(self.schedule.drives[d], 0, len(self.schedule.drives[d].slots))
                    self._evaluated(d)
            for name in component.areas:
                self._allocate(name, component)
            if component.batched:
                self._update(component.areas[0], 0, self.schedule.num_slots[component.areas[0]])
            else:
                for name, slot in component.updates:
                    self._update(name, slot, slot + 1)
            self._leave(component)
        drives = {(f"drive{d}", "drive"): drive for d, drive in self.drives.items()}
        return drives | self.buffers

    def _leave(self, component: Component) -> None:
        """Give up what was for this component alone."""
        later = self.schedule.components[self.schedule.components.index(component) + 1 :]
        for d in (*component.drives_in, *component.drives_within):
            if not any(d in c.drives_in for c in later):
                if d not in self.drives:
                    self._evaluated(d)
                elif (f"drive{d}", "drive") not in self.kept:
                    del self.drives[d]
        forms = set(POOL_KIND.values())
        for key in [(name, kind) for name, kind in self.buffers if name in component.areas and kind not in forms]:
            if key not in self.kept:
                del self.buffers[key]

    def _evaluated(self, index: int) -> None:
        """Nobody needs a drive's weight any more, nor, after its last drive, a form that backward does not need."""
        drive, weight = self.schedule.drives[index], self.operands.weights[index]
        if weight is not None:
            weight.drop_packed()
        form = drive.source, drive.connection.pool
        self.unread[form] -= 1
        if not self.unread[form] and (key := (form[0], POOL_KIND[form[1]])) not in self.kept and form[0] not in self.schedule.record:
            self.buffers.pop(key, None)

    def _with_update(self, index: int, component: Component) -> bool:
        """Whether a drive from outside is computed together with its area's one update, which alone reads it."""
        drive = self.schedule.drives[index]
        once = drive.connection.operator is not Operator.IDENTITY and self.uses[index] == len(drive.slots)
        return component.batched and once and (f"drive{index}", "drive") not in self.kept

    def _pending(self, drive: Drive, first: int, last: int) -> Value:
        """Positions first..last-1 of a drive, [positions * N, H, W, C]; its linear map, if it has one, still to be computed."""
        if (form := (drive.source, drive.connection.pool, drive.slots[first])) in self.forms:
            x = self._passing_form(form)
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
            size = slots, samples, *shape
            if pool is Pool.MAX:
                self.buffers[name, "argmax"] = empty(form_shape(size, pool), torch.uint8)
            if self._passes(name, pool, component):
                self.passing.update({(name, pool, slot): n for slot in range(slots) if (n := self._readers(name, pool, slot))})
            else:
                self.buffers[name, POOL_KIND[pool]] = empty(form_shape(size, pool), dtype)
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
        if modulated := modulated_slots(schedule, name):
            self.buffers[name, "modulator"] = empty((len(modulated), samples, *shape), dtype)

    def _passes(self, name: str, pool: Pool, component: Component) -> bool:
        """Whether a form of an area's map is read step by step, within its component, and then no more."""
        readers = {d.index for d in self.schedule.drives if d.source == name and d.connection.pool is pool}
        recorded = pool is Pool.NONE and name in self.schedule.record
        return not recorded and (name, POOL_KIND[pool]) not in self.kept and readers <= set(component.drives_within)

    def _readers(self, name: str, pool: Pool, slot: int) -> int:
        return sum(d.source == name and d.connection.pool is pool and slot in d.slots for d in self.schedule.drives)

    def _passing_form(self, form: FormSlot) -> Tensor:
        """A form that passes: [N, H, W, C]. It goes with its last reader."""
        x = self.forms[form]
        self.passing[form] -= 1
        if not self.passing[form]:
            del self.forms[form]
        return x

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
        drives, modulators = self.schedule.split_terms[name, first]

        def buffer(kind: str, where: slice = slots) -> Tensor | None:
            stack = self.buffers.get((name, kind))
            return None if stack is None else stack[where].flatten(0, 1)

        value = buffer("value")
        scratch = buffer("scratch", slice(0, last - first))
        # (The term whose memory the value takes must be the first.)
        drives = tuple(sorted(drives, key=lambda t: t.drive != self.in_place.get(name)))
        values = [self._term_value(t, slots) for t in drives]
        forms = {}
        for pool, kind in POOL_KIND.items():
            forms[pool] = buffer(kind)
            if (name, pool, first) in self.passing:
                size = operands.samples, *_hwc(self.schedule, name)
                forms[pool] = self.forms[name, pool, first] = empty(form_shape(size, pool), operands.dtype)
        argmax = buffer("argmax")
        if argmax is not None and forms[Pool.MAX] is None:
            argmax.zero_()  # (nobody reads the maximum; what is kept is the same in every run)
        modulator_sum = None
        if modulators:
            position = modulated_slots(self.schedule, name).index(first)
            modulator_sum = buffer("modulator", slice(position, position + last - first))
        update_area(
            area,
            values,
            [self._term_value(t, slots) for t in modulators],
            operands.bias(drives),
            operands.bias(modulators),
            value if value is not None else scratch,
            buffer("centre"),
            buffer("rstd"),
            modulator_sum,
            state=forms[Pool.NONE],
            max_pooled=forms[Pool.MAX],
            argmax=argmax if forms[Pool.MAX] is not None else None,
            mean_pooled=forms[Pool.MEAN],
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
    kept = saved_buffers(schedule)
    buffers = Training(operands, schedule.components, kept).run()
    outputs = _outputs(operands)
    for name, output in zip(schedule.record, outputs, strict=True):
        for t in range(schedule.first_step[name], schedule.timesteps):
            output[t - schedule.first_step[name]] = buffers[name, "state"][schedule.slot_of[name][t]]
    return [as_states(o) for o in outputs], [buffers[b.key] for b in kept]


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
        drives, modulators = schedule.split_terms[name, slot]
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
            elif pool is Pool.NONE and value is not None and ours and not operands.on_device:
                # In the place of the value, whose lines are at hand: a map of its own would be read before it is written.
                self.forms[form], ours = value, False
            else:
                self.forms[form] = self._map(form_shape(shape, pool))
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
