"""Backpropagation through time over a schedule.

Components are visited in reverse, and within each its updates in reverse. A drive within a component returns its gradient step by step.
Everything else about a drive waits until a window of its area's slots is full: then the gradients of its weight and, where it comes from
outside, of its data are one call over the window, whose room the slots before it use next. A drive that is read several times gathers
its gradient in a sum of its own, and returns it when its last reader is done.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rnndyn_fast.graph.forward import Training, stacked
from rnndyn_fast.graph.operands import Operands, area_step_forward, at_most
from rnndyn_fast.graph.saved import POOL_KIND, computed_again, modulated_slots, needed_buffers, saved_buffers
from rnndyn_fast.graph.schedule import Component, FormSlot, Schedule, Term, is_drive_term
from rnndyn_fast.graph.spec import Input, Interaction, Norm, Operator, Pool, pooled_shape
from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.channels_last import channels_last
from rnndyn_fast.ops.convolution import convolve_backward

# Bytes of a window: several time steps of an area, so that a call over it is worth its start, and few enough that not all of them are held.
WINDOW_BYTES = 6 * 1024 * 1024


class _GradientOf:
    """Where the gradient of a drive gathers: a range of its area's own buffer, or a sum of its own."""

    def __init__(self, schedule: Schedule, index: int) -> None:
        drive = schedule.drives[index]
        uses = [(item, t) for item, terms in schedule.terms.items() for t in terms if t.drive == index]
        (area, slot), term = uses[0]
        self.area = area
        self.offset = slot - term.position
        # One reader per position, all in one area, at a fixed distance, in one role: then nothing has to be summed.
        self.aligned = len(uses) == len(drive.slots) and all(
            item[0] == area and item[1] - t.position == self.offset and t.connection is term.connection for item, t in uses
        )
        self.kind = "drive" if is_drive_term(schedule.network, term.connection) else "modulator"


class _Backward:
    def __init__(self, operands: Operands, saved: Sequence[Tensor], needs: dict[str, bool]) -> None:
        self.operands = operands
        self.schedule = operands.schedule
        self.needs = needs
        self._saved = {b.key: t for b, t in zip(saved_buffers(self.schedule), saved, strict=True)}
        self._made = {b.key for b in needed_buffers(self.schedule)} - self._saved.keys()  # when they are first asked for
        self.grads: dict[str, Tensor] = {}  # of parameters
        self.forms: defaultdict[FormSlot, list[Tensor]] = defaultdict(list)  # gradients of maps, [N, H, W, C] each
        self.area_grads: dict[tuple[str, str], Tensor] = {}  # (area, drive | modulator) -> its window, [slots, N, H, W, C]
        self.windows: dict[str, range] = {}  # area -> the slots that its window holds
        self.recomputed: tuple[str, Pool, Sequence[int]] | None = None  # of maps that forward did not keep
        self.again = torch.empty(0)  # those maps, [slots, N, H, W, C]
        self.drive_sums: dict[int, Tensor] = {}  # [positions, N, H, W, C], for drives that are not aligned
        self.where = [_GradientOf(self.schedule, d.index) for d in self.schedule.drives]
        self.uses_left = Counter((t.drive, t.position) for terms in self.schedule.terms.values() for t in terms)
        self.total_left = Counter(t.drive for terms in self.schedule.terms.values() for t in terms)
        self.inputs = {node.name: node for node in self.schedule.network.inputs}
        self.reaches = self._reaches_gradient()

    # ---------------------------------------------------------------- what is needed

    def _reaches_gradient(self) -> set[str]:
        """Nodes through which some wanted gradient passes."""
        reaches = {name for name in self.inputs if self.needs.get(name)}
        changed = True
        while changed:
            changed = False
            for (name, _), terms in self.schedule.terms.items():
                if name not in reaches and (
                    self._norm_needed(name) or any(self._weight_needed(t) or self.schedule.drives[t.drive].source in reaches for t in terms)
                ):
                    reaches.add(name)
                    changed = True
        return reaches

    def _norm_needed(self, name: str) -> bool:
        prefix = self.schedule.network.area(name).norm_parameter
        return bool(self.needs.get(f"{prefix}.weight") or self.needs.get(f"{prefix}.bias"))

    def _weight_needed(self, term: Term) -> bool:
        prefix = term.connection.parameter
        return bool(self.needs.get(f"{prefix}.weight") or self.needs.get(f"{prefix}.bias"))

    # ---------------------------------------------------------------- saved values

    def _kept(self, owner: str, kind: str) -> Tensor | None:
        """A buffer of :func:`needed_buffers`, if there is such a one."""
        if (owner, kind) in self._made and (owner, kind) not in self._saved:
            self._saved |= Training(self.operands, computed_again(self.schedule), needed_buffers(self.schedule)).run()
        return self._saved.get((owner, kind))

    def _slot(self, owner: str, kind: str, slot: int) -> Tensor | None:
        stack = self._kept(owner, kind)
        return None if stack is None else stack[slot]

    def _form(self, name: str, pool: Pool, slots: Sequence[int]) -> Tensor:
        """Some slots of a form of a map: [slots, N, H, W, C]."""
        kept = self._kept(name, POOL_KIND[pool])
        if kept is not None:
            return stacked(kept, slots)
        if name not in self.inputs:
            return self._again(name, pool, slots)
        return torch.stack([self.operands.ingest(self.inputs[name], pool, slot)[0] for slot in slots])  # an input's own map

    def _again(self, name: str, pool: Pool, slots: Sequence[int]) -> Tensor:
        """A form of an area's map that forward did not keep, until another is asked for: [slots, N, H, W, C]."""
        if self.recomputed != (name, pool, slots):
            schedule, operands, area = self.schedule, self.operands, self.operands.areas[name]
            shape = self._map_shape(name)
            self.recomputed, self.again = None, torch.empty(0)  # whose room comes first
            self.again = empty((len(slots), *self._map_shape(name, pool)), operands.dtype)
            self.recomputed = (name, pool, slots)
            kept = self._kept(name, "value")
            mean, rstd = self._kept(name, "centre"), self._kept(name, "rstd")
            assert mean is not None
            assert rstd is not None
            scratch = empty(shape, operands.dtype) if kept is None and operands.on_device else None
            for k, slot in enumerate(slots):
                drives, modulators = schedule.split_terms[name, slot]
                area_step_forward(
                    [kept[slot]] if kept is not None else at_most([self._drive_value(t) for t in drives]),
                    [self._factor(name, slot)] if modulators else [],
                    drive_bias=None if kept is not None else operands.bias(drives),
                    modulator_complete=True,
                    complete=not operands.on_device or kept is not None,
                    gamma=area.gamma,
                    beta=area.beta,
                    eps=area.eps,
                    rectify=area.rectify,
                    value=kept[slot] if kept is not None else scratch,  # (kept: it is its own drive, and not written)
                    state=self.again[k] if pool is Pool.NONE else None,
                    max_pooled=self.again[k] if pool is Pool.MAX else None,
                    mean=mean[slot].clone(),
                    rstd=rstd[slot].clone(),
                )
        return self.again

    def _factor(self, name: str, slot: int) -> Tensor:
        """What modulators made of a slot's drive: [N, H, W, C]."""
        factor = self._slot(name, "modulator", modulated_slots(self.schedule, name).index(slot))
        assert factor is not None
        return factor

    def _drive_value(self, term: Term) -> Tensor:
        """A drive term that a modulator multiplied: [N, H, W, C]."""
        drive = self.schedule.drives[term.drive]
        if drive.connection.operator is Operator.IDENTITY:
            return self._form(drive.source, drive.connection.pool, [drive.slots[term.position]])[0]
        kept = self._slot(f"drive{term.drive}", "drive", term.position)
        assert kept is not None
        return kept

    # ---------------------------------------------------------------- one component

    def run(self) -> None:
        for component in reversed(self.schedule.components):
            if not self.reaches.intersection(component.areas):
                continue
            for name in component.areas:
                self._allocate(name)
            for name, slot in reversed(component.updates):
                self._update(name, slot, component)
            for d in component.drives_within:
                if (weight := self.operands.weights[d]) is not None:
                    weight.drop_packed()  # its memory is wanted for the gradient
            for name in component.areas:
                self._finish_window(name)
            for d in sorted(component.drives_within, key=lambda d: self.schedule.drives[d].source):
                if not self.where[d].aligned:
                    self._finish_drive(d, 0, len(self.schedule.drives[d].slots), within=True)
            for d in component.drives_in:
                if not self.where[d].aligned and self.total_left[d] == 0:
                    self._finish_drive(d, 0, len(self.schedule.drives[d].slots), within=False)
            self.area_grads.clear()
            self.recomputed, self.again = None, torch.empty(0)

    def _drives_into(self, name: str) -> set[int]:
        return {t.drive for s in range(self.schedule.num_slots[name]) for t in self.schedule.terms[name, s]}

    def _grad_kinds(self, name: str) -> list[str]:
        """Of its drive and its modulator, those whose gradients have a window."""
        return sorted({self.where[d].kind for d in self._drives_into(name) if self.where[d].aligned and self.where[d].area == name})

    def _map_shape(self, name: str, pool: Pool = Pool.NONE) -> tuple[int, ...]:
        channels, height, width = pooled_shape(self.schedule.network.shapes[name], pool)
        return self.operands.samples, height, width, channels

    def _window_slots(self, name: str) -> int:
        """Slots of an area in a window: as many as fit, in windows of nearly equal size."""
        slots = self.schedule.num_slots[name]
        fit = max(1, WINDOW_BYTES // (math.prod(self._map_shape(name)) * self.operands.dtype.itemsize))
        return -(-slots // -(-slots // fit))

    def _allocate(self, name: str) -> None:
        schedule, operands = self.schedule, self.operands
        shape = self._map_shape(name)
        for kind in self._grad_kinds(name):
            self.area_grads[name, kind] = empty((self._window_slots(name), *shape), operands.dtype)
        for d in self._drives_into(name):
            if not self.where[d].aligned and d not in self.drive_sums:
                drive = schedule.drives[d]
                self.drive_sums[d] = empty((len(drive.slots), *shape), operands.sums_dtype).zero_()
        area = schedule.network.area(name)
        if area.norm is Norm.LAYER:
            for kind in ("weight", "bias"):
                # (areas may share a norm's parameters)
                if (key := f"{area.norm_parameter}.{kind}") not in self.grads:
                    self.grads[key] = operands.affine_room.take(shape[1:], operands.sums_dtype).zero_()

    def _take(self, name: str, pool: Pool, slot: int) -> list[Tensor]:
        return self.forms.pop((name, pool, slot), [])

    def _update(self, name: str, slot: int, component: Component) -> None:
        schedule, operands = self.schedule, self.operands
        area, spec = operands.areas[name], schedule.network.area(name)
        samples, height, width, channels = self._map_shape(name)
        shape = (samples, height, width, channels)
        if slot not in self.windows.get(name, ()):
            self._finish_window(name)
            self.windows[name] = range(max(0, slot + 1 - self._window_slots(name)), slot + 1)
        drives, modulators = schedule.split_terms[name, slot]
        multiplicative = spec.interaction is Interaction.MULTIPLICATIVE

        def kept(kind: str) -> Tensor | None:
            return self._slot(name, kind, slot)

        def own(kind: str) -> Tensor | None:
            window = self.area_grads.get((name, kind))
            return None if window is None else window[slot - self.windows[name].start]

        sums = [t for t in drives if not self.where[t.drive].aligned]
        sums_modulator = [t for t in modulators if not self.where[t.drive].aligned]
        grad_drive = own("drive")
        if grad_drive is None and (area.gamma is not None or len(sums) > 1):
            grad_drive = empty(shape, operands.dtype)
        grad_modulator = own("modulator") if modulators else None
        if grad_modulator is None and sums_modulator:
            grad_modulator = empty(shape, operands.dtype)
        max_pooled, mean_pooled = self._take(name, Pool.MAX, slot), self._take(name, Pool.MEAN, slot)
        _launch.area_step_backward(
            shape,
            operands.dtype,
            at_most(self._take(name, Pool.NONE, slot)),
            at_most(max_pooled, 1)[0] if max_pooled else None,
            kept("argmax") if max_pooled else None,
            at_most(mean_pooled, 1)[0] if mean_pooled else None,
            multiplicative,
            kept("state") if spec.norm is Norm.NONE and kept("value") is None else kept("value"),
            at_most([self._drive_value(t) for t in drives]) if multiplicative else [],
            operands.bias(drives) if multiplicative else None,
            self._factor(name, slot) if modulators else None,
            kept("centre"),
            kept("rstd"),
            area.gamma,
            area.beta,
            area.rectify,
            grad_drive,
            self.drive_sums[sums[0].drive][sums[0].position] if sums else None,
            grad_modulator,
            self.grads.get(f"{spec.norm_parameter}.weight"),
            self.grads.get(f"{spec.norm_parameter}.bias"),
        )
        for t in sums[1:]:
            assert grad_drive is not None
            self.drive_sums[t.drive][t.position] += grad_drive
        for t in sums_modulator:
            assert grad_modulator is not None
            self.drive_sums[t.drive][t.position] += grad_modulator
        for t in (*drives, *modulators):
            self.uses_left[t.drive, t.position] -= 1
            self.total_left[t.drive] -= 1
            if t.drive in component.drives_within and self.uses_left[t.drive, t.position] == 0:
                self._return_to_source(t.drive, t.position, t.position + 1)

    # ---------------------------------------------------------------- drives

    def _drive_grad(self, index: int, first: int, last: int) -> Tensor:
        where = self.where[index]
        if not where.aligned:
            return self.drive_sums[index][first:last].to(self.operands.dtype)
        start = where.offset - self.windows[where.area].start
        return self.area_grads[where.area, where.kind][first + start : last + start]

    def _return_to_source(self, index: int, first: int, last: int, need_weight: bool = False) -> None:
        """Gradient of some positions of a drive, back to the maps it read; with it, where wanted, the weight's."""
        drive = self.schedule.drives[index]
        c = drive.connection
        slots = drive.slots[first:last]
        need_x = drive.source in self.reaches
        grad = self._drive_grad(index, first, last)
        # (A copy for another component, which will use the room that holds it now.)
        grad_x: Tensor | None = grad.clone() if c.operator is Operator.IDENTITY else None
        if c.operator is not Operator.IDENTITY and (need_x or need_weight):
            weight = self.operands.weights[index]
            assert weight is not None
            if need_weight:
                x: Tensor | torch.Size = self._form(drive.source, c.pool, slots).flatten(0, 1)
            else:
                channels, height, width = pooled_shape(self.schedule.network.shapes[drive.source], c.pool)
                x = torch.Size((len(slots) * self.operands.samples, height, width, channels))
            key = f"{c.parameter}.weight"
            grad_x, grad_weight = convolve_backward(
                weight, grad.flatten(0, 1), x, need_x=need_x, need_weight=need_weight, weight_into=self.grads.get(key)
            )
            if grad_weight is not None:
                self.grads[key] = grad_weight
            grad_x = grad_x.unflatten(0, (len(slots), -1)) if grad_x is not None else None
        if need_x and grad_x is not None:
            for k, slot in enumerate(slots):
                self.forms[drive.source, c.pool, slot].append(grad_x[k])

    def _finish_window(self, name: str) -> None:
        """What waited for a window of an area's slots, if it has one."""
        if name not in self.windows:
            return
        members = next(c.areas for c in self.schedule.components if name in c.areas)
        for d in sorted(self._drives_into(name), key=lambda d: (self.schedule.drives[d].source, d)):
            where, drive = self.where[d], self.schedule.drives[d]
            if where.aligned:
                first = max(0, self.windows[name].start - where.offset)
                last = min(len(drive.slots), self.windows[name].stop - where.offset)
                if first < last:
                    self._finish_drive(d, first, last, within=drive.source in members)
        del self.windows[name]

    def _finish_drive(self, index: int, first: int, last: int, *, within: bool) -> None:
        """What is done for many positions of a drive at once: its weight's and bias's gradients and, from outside, its data's."""
        drive = self.schedule.drives[index]
        c = drive.connection
        if c.bias and self.needs.get(f"{c.parameter}.bias"):
            self._add(f"{c.parameter}.bias", self._drive_grad(index, first, last).sum((0, 1, 2, 3), dtype=self.operands.sums_dtype))
        need_weight = bool(c.operator is not Operator.IDENTITY and self.needs.get(f"{c.parameter}.weight"))
        if not within:
            self._return_to_source(index, first, last, need_weight)
        elif need_weight:
            weight = self.operands.weights[index]
            assert weight is not None
            x = self._form(drive.source, c.pool, drive.slots[first:last])
            grad = self._drive_grad(index, first, last)
            key = f"{c.parameter}.weight"
            _, grad_weight = convolve_backward(
                weight, grad.flatten(0, 1), x.flatten(0, 1), need_x=False, need_weight=True, weight_into=self.grads.get(key)
            )
            assert grad_weight is not None
            self.grads[key] = grad_weight
        self.drive_sums.pop(index, None)

    def _add(self, name: str, grad: Tensor) -> None:
        if name in self.grads:
            self.grads[name] += grad
        else:
            self.grads[name] = grad

    # ---------------------------------------------------------------- results

    def input_grad(self, node: Input) -> Tensor | None:
        """Gradient of an input, [N, C, H, W] or [T, N, C, H, W]."""
        slots = range(self.schedule.timesteps) if node.frames else range(1)
        shape = (self.operands.samples, node.height, node.width, node.channels)
        total = torch.zeros((len(slots), *shape), dtype=self.operands.dtype)
        for slot in slots:
            plain = self._take(node.name, Pool.NONE, slot)
            pooled, mean = self._take(node.name, Pool.MAX, slot), self._take(node.name, Pool.MEAN, slot)
            if plain or pooled or mean:
                _launch.area_step_backward(
                    shape, self.operands.dtype, at_most(plain),
                    at_most(pooled, 1)[0] if pooled else None,
                    self._slot(node.name, "argmax", slot) if pooled else None,
                    at_most(mean, 1)[0] if mean else None,
                    False, None, [], None, None, None, None, None, None, False, total[slot], None, None, None, None,
                )  # fmt: skip
        total = total.permute(0, 1, 4, 2, 3).contiguous()
        return total if node.frames else total[0]

    def parameter_grad(self, name: str) -> Tensor | None:
        """Gradient of a parameter; None where nothing of it was used."""
        grad = self.grads.get(name)
        if grad is None or not self.needs.get(name):
            return None
        is_norm = any(
            a.norm is Norm.LAYER and name in (f"{a.norm_parameter}.weight", f"{a.norm_parameter}.bias") for a in self.schedule.network.areas
        )
        if is_norm:  # [H, W, C] as the kernel sums it, in a room that others share
            height, width, channels = grad.shape
            grad = channels_last(grad.view(1, height * width, 1, channels), grad.new_empty((1, 1, channels, height * width)))
        parameter = self.operands.parameters[name]
        return grad.reshape(parameter.shape).to(parameter.dtype)


def backward(
    operands: Operands,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],  # per recorded area, [T', N, C, H, W]
    needs: dict[str, bool],
) -> dict[str, Tensor | None]:
    """Gradients of the inputs and parameters named in ``needs`` with True; None for a parameter that no term used."""
    schedule = operands.schedule
    run = _Backward(operands, saved, needs)
    for name, grad in zip(schedule.record, grads, strict=True):
        maps = grad.permute(0, 1, 3, 4, 2).contiguous()
        for t in range(schedule.first_step[name], schedule.timesteps):
            run.forms[name, Pool.NONE, schedule.slot_of[name][t]].append(maps[t - schedule.first_step[name]])
    run.run()
    result: dict[str, Tensor | None] = {}
    for name, node in run.inputs.items():
        if needs.get(name):
            result[name] = run.input_grad(node)
    for name in operands.parameters:
        result[name] = run.parameter_grad(name)
    return result
