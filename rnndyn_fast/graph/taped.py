"""A schedule run by our own engines and kernels, as one autograd node: every word of a spec.

float32 and float64 on the CPU; float32, float16 and bfloat16 on CUDA devices, with parameters, statistics and sums in float32.

Forward notes on a tape (:mod:`rnndyn_fast.graph.tape`) what backward walks back. Where gradients are wanted, components run one after
another: drives into a component are one call over all their slots, and so are the gradients of weights. Without gradients it goes time
step by time step, and a map is dropped after its last reader. What no kernel computes (:mod:`rnndyn_fast.graph.linear`,
:mod:`rnndyn_fast.graph.area_rules`), PyTorch does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.area_rules import Slots
from rnndyn_fast.graph.device import on_its_device
from rnndyn_fast.graph.linear import DenseMap
from rnndyn_fast.graph.replay import Flight, Recording, recording_of, run_inference
from rnndyn_fast.graph.schedule import Component, Drive, Schedule
from rnndyn_fast.graph.spec import Operator, pooled_shape
from rnndyn_fast.graph.tape import Key, map_key, parted
from rnndyn_fast.graph.taped_maps import Rooms
from rnndyn_fast.graph.taped_terms import Terms
from rnndyn_fast.ops import _launch, _launch_cuda
from rnndyn_fast.ops.buffers import empty, same_place, sums_dtype
from rnndyn_fast.ops.forward_mode import in_forward_mode, in_transform
from rnndyn_fast.ops.recording import empty_result, recorder
from rnndyn_fast.ops.winograd_conv import WinogradMap
from rnndyn_fast.reference.rollout import Statistics

_MANY_TILES = 64  # of a time step, from which on Winograd's weights are read often enough: terms are then summed step by step

LARGE_MAP = 1 << 20  # bytes, from which on the first components of such a run take some samples at a time

MUCH_PACKED = 24 << 20  # bytes of packed weights that inference component by component must save: it packs them anew every time


class TapedRun(Terms):
    """One rollout: areas in their order, recorded states, and the way back."""

    def update(self, name: str, slots: range) -> None:
        """Some slots of an area."""
        step = self.schedule.slot_of[name].index(slots[0])
        at = Slots(self.network.area(name), slots, step, lambda kind, channels: self.room(name, slots, kind, channels))
        states = self.rules.update(at, self.ports(name, slots))
        for state, value in states.items():
            for slot, part in zip(slots, parted(value, len(slots)), strict=True):
                self.maps[map_key(name, slot, state)] = part
        for slot in slots:
            self.pool_early(name, slot)
        self.tidy()

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
        if not isinstance(linear, DenseMap) or not isinstance(linear.weight.choice.map, WinogradMap):
            return False
        _, height, width = pooled_shape(self.network.shapes[drive.source], drive.connection.pool)
        return self.samples * linear.weight.choice.map.tiles(height, width) >= _MANY_TILES

    def run(self, numbers: range) -> None:
        """Some components, one after another."""
        for number in numbers:
            component = self.schedule.components[number]
            deferred = self._deferred(component) if component.recurrent else set()
            self.ahead = {d for d in component.drives_in if d not in deferred and not self.schedule.drives[d].static}
            together = tuple({*component.drives_within, *deferred})
            self.postponed |= set(together)
            self.tape.record(self.component_back, together, component.areas)
            if component.batched and len(component.updates) > 1 and not self.schedule.zeros[component.updates[0]]:
                for slots in self._windows(component.areas[0]):
                    self.update(component.areas[0], slots)
            else:
                for name, slot in component.updates:
                    self.update(name, range(slot, slot + 1))
            self.drop_blocks(component.areas)
            self._drop_read(number)
            self.tidy()

    def _drop_read(self, number: int) -> None:
        """Give up the weights packed for a component, but those that a later one reads."""
        components, drives = self.schedule.components, self.schedule.drives
        later = {drives[d].connection.weights for c in components[number + 1 :] for d in (*c.drives_in, *c.drives_within)}
        for d in (*components[number].drives_in, *components[number].drives_within):
            linear = self.linear.get(d)
            if linear is not None and linear.dense is not None and drives[d].connection.weights not in later:
                linear.dense.drop_packed_forward()

    def _choose_order(self) -> None:
        """Without gradients: one component after another where that saves much memory of packed weights, which then are not kept."""
        if self.tape.recording:
            return
        packed: list[dict[int, int]] = []
        for component in self.schedule.components:
            linear = [self.linear_of(d) for i in (*component.drives_in, *component.drives_within)
                      if (d := self.schedule.drives[i]).connection.operator is not Operator.IDENTITY]  # fmt: skip
            packed.append({id(m.dense): m.dense.packed_bytes for m in linear if m is not None and m.dense is not None})
        every = {key: nbytes for one in packed for key, nbytes in one.items()}
        self.by_component = sum(every.values()) - max(sum(one.values()) for one in packed) > MUCH_PACKED
        self.keeps_packed = not self.by_component
        for found in self._packed.values():
            if found is not None and found.dense is not None and self.by_component:
                found.dense.keep = False

    # ---------------------------------------------------------------- some samples at a time

    def _large(self) -> int:
        """How many components come first, in inference component by component, whose maps are large and not recorded: they run some
        samples at a time, as samples have nothing to do with each other there."""
        components = self.schedule.components
        if self.tape.recording or self.statistics is not None or self.some == self.samples:
            return 0
        return next((n for n, c in enumerate(components) if self.recorded & set(c.areas) or self._bytes(c) * self.samples <= LARGE_MAP), 0)

    def _bytes(self, component: Component) -> int:
        """Of the largest map of one sample."""
        return max(math.prod(self.network.shapes[name]) for name in component.areas) * self.example.element_size()

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
            rows = slice(first, min(first + self.some, self.samples))
            inputs = [x[:, rows] if node.frames else x[rows] for node, x in self.inputs.values()]
            part = TapedRun(self.schedule, inputs, self.given, None, self.engine, set())
            part.tidies, part.by_component, part.keeps_packed = self.tidies, True, False
            part.run(range(count))
            for drive in drives:
                if drive.source in own and drive.index not in inside:
                    for slot in drive.slots:
                        x, key = part.form(drive, slot)
                        known = self.maps if key is not None and key[0] == "map" else self.forms
                        if key not in known:
                            known[key] = empty((self.samples, *x.shape[1:]), x.dtype)
                        known[key][rows].copy_(x)
        for d in inside:
            for slot in drives[d].slots:
                self.map_uses[drives[d].source, slot] -= 1

    def outputs(self) -> list[Tensor]:
        """Run, and return the recorded states, [T', N, H, W, C] each."""
        schedule = self.schedule
        found = {name: self._place_of(name) for name in schedule.record}
        self._choose_order()
        if self.by_component:
            large = self._large()
            if large:
                self._run_large(large)
            self.run(range(large, len(self.schedule.components)))
        places = {name: out.unbind() for name, out in found.items()}
        steps: defaultdict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)  # of an area's slot, those of what is recorded
        for name in found:
            area = self.network.recorded(name)[0]
            for t, slot in enumerate(schedule.slot_of[area][schedule.first_step[name] :]):
                steps[area, slot].append((name, t))
        for area, slot in schedule.time_major:
            if not self.by_component:
                self.update(area, range(slot, slot + 1))
            for name, t in steps[area, slot]:
                value, place = self.maps[self._recorded_key(name, slot)], places[name][t]
                if not same_place(place, value):
                    place.copy_(value)
            if not self.tape.recording and not self.map_uses[area, slot]:
                self._drop(area, slot)
        self.maps, self.forms, self.terms = {}, {}, {}
        self.blocks, self.whole = {}, {}
        self._drop_packed(forward=True)
        return list(found.values())

    def _drop_packed(self, *, forward: bool) -> None:
        """Give up the packed weights of one direction: many times as large as maps, and not read any more."""
        for linear in self._packed.values():
            if linear is not None and linear.dense is not None:
                linear.dense.drop_packed_forward() if forward else linear.dense.drop_packed()

    def _place_of(self, name: str) -> Tensor:
        """Of recorded states, [T', N, H, W, C]. Where every step has a slot of its own they are written there right away: autograd sees to
        it that nobody changes them before backward."""
        key = self._recorded_key(name, 0)
        assert key is not None
        channels, height, width = self.network.shapes[key[1]]
        steps = self.schedule.slot_of[key[1]][self.schedule.first_step[name] :]
        found = empty_result((len(steps), self.samples, height, width, channels), self.example.dtype)
        if steps == list(range(self.schedule.num_slots[key[1]])):
            self.whole.setdefault((key[1], f"state {key[3]}"), Rooms(found))
        return found

    def _recorded_key(self, name: str, slot: int) -> Key:
        area, state = self.network.recorded(name)
        return map_key(area, slot, state if state is not None else self.network.area(area).states[0])

    def walk_back(self, grads: Sequence[Tensor | None], keep: bool) -> None:
        """Gradients of everything wanted, from those of the recorded states, [T', N, C, H, W]."""
        for name, grad in zip(self.schedule.record, grads, strict=True):
            if grad is not None:
                area = self.network.recorded(name)[0]
                steps = grad.permute(0, 1, 3, 4, 2)
                if grad.stride(0) == 0:  # (a sum over time: the same at every step)
                    steps = steps[0].contiguous().expand(steps.shape)
                for t, slot in enumerate(self.schedule.slot_of[area][self.schedule.first_step[name] :]):
                    self.tape.grads.add(self._recorded_key(name, slot), steps[t], own=False)
        self.tape.walk_back(keep)
        self.blocks = {}
        self._drop_packed(forward=False)
        self.weights_back(list(self.collected))

    def gradients(self, grads: Sequence[Tensor | None], needed: Sequence[str | None], keep: bool) -> list[Tensor | None]:
        """:meth:`walk_back`, and what is needed, by name: in the parameters' shapes."""
        self.walk_back(grads, keep)
        found: list[Tensor | None] = []
        for name in needed:
            grad = None if name is None else self.input_grad(name) if name in self.inputs else self.tape.parameter_grads.get(name)
            if grad is not None and name is not None and name not in self.inputs:
                parameter = self.given[name]
                grad = grad.reshape(parameter.shape).to(parameter.dtype)
            found.append(grad)
        self.tape.parameter_grads = {}
        return found

    def input_grad(self, name: str) -> Tensor | None:
        """[N, C, H, W], or [T, N, C, H, W] of frames."""
        node, x = self.inputs[name]
        result = torch.zeros_like(x)
        for slot in range(self.schedule.timesteps) if node.frames else (0,):
            grad, _ = self.tape.grads.take(map_key(name, slot, None))
            if grad is not None:
                (result[slot] if node.frames else result).add_(grad.permute(0, 3, 1, 2))
        return result


def _flat(states: list[Tensor], statistics: Statistics | None) -> list[Tensor]:
    """States, and then mean and variance of each batch norm."""
    return [*states, *(t for pair in (statistics or {}).values() for t in pair)]


def _states(found: list[Tensor], statistics: Statistics | None, recording: Recording) -> list[Tensor]:
    """Undo :func:`_flat`, and put the statistics where they belong."""
    if statistics is None:
        return found
    recording.names = recording.names or tuple(statistics)
    states = found[: len(found) - 2 * len(recording.names)]
    moments = iter(found[len(states) :])
    statistics.update({name: (mean, variance) for name, mean, variance in zip(recording.names, moments, moments, strict=True)})
    return states


class _Taped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        start: Callable[[], TapedRun],
        flight: Flight | None,
        statistics: Statistics | None,
        names: tuple[str, ...],
        num_inputs: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.start, ctx.flight, ctx.names, ctx.num_inputs = None, start, flight, names, num_inputs

        def run() -> list[Tensor]:
            ctx.run = start()
            return ctx.run.outputs()

        with on_its_device(tensors[0]):
            if flight is None:
                outputs = run()
            else:
                found, _ = flight.forward(tensors[:num_inputs], tensors[num_inputs:], lambda: (_flat(run(), statistics), []))
                outputs = _states(found, statistics, flight.recording)
        ctx.set_materialize_grads(False)
        results = tuple(out.permute(0, 1, 4, 2, 3) for out in outputs)
        ctx.save_for_backward(*tensors, *results)  # (so that a change in place between forward and backward raises)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('the scheduled rollout cannot be differentiated twice; use backend="reference" for second derivatives')
        tensors = ctx.saved_tensors[: len(ctx.names)]
        keep, flight = torch._C._autograd._get_current_graph_task_keep_graph(), ctx.flight
        needed = [name if need else None for name, need in zip(ctx.names, ctx.needs_input_grad[5:], strict=True)]

        def walk_back() -> list[Tensor | None]:
            found = ctx.run.gradients(grads, needed, keep)
            if not keep:
                ctx.run = None
            return found

        with on_its_device(tensors[0]):
            if flight is not None and not keep:
                ctx.flight = None  # (whoever holds the loss holds this node, but need not hold the stage)
                if flight.fits(grads, tuple(needed)):
                    split = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
                    return None, None, None, None, None, *flight.backward(*split, grads, tuple(needed), walk_back)
            if ctx.run is None:  # (it was replayed, and there is no tape)
                ctx.run = ctx.start()
                ctx.run.outputs()
            return None, None, None, None, None, *walk_back()


def can_run_taped(tensors: Sequence[Tensor]) -> bool:
    """Whether :func:`rollout_taped` takes these inputs and parameters, here, in no functional transform. The first is an input.

    On the CPU float32 or float64; on CUDA devices float32, float16 or bfloat16, where parameters of half-precision maps may be float32.
    """
    example = tensors[0]
    if _launch.on_device(example):
        parameters = (example.dtype, sums_dtype(example.dtype))
        known = _launch_cuda.why_not(example) is None and all(t.device == example.device and t.dtype in parameters for t in tensors)
    else:
        known = example.dtype in (torch.float32, torch.float64)
        known = known and all(t.device.type == "cpu" and t.dtype == example.dtype for t in tensors)
    return _launch.unavailable is None and known and not in_transform() and not in_forward_mode(tensors)


def rollout_taped(
    schedule: Schedule,
    inputs: Sequence[Tensor],  # [N, C, H, W], or [T, N, C, H, W] where the input has frames
    parameters: Mapping[str, Tensor],  # and buffers, where there are any
    statistics: Statistics | None,
    engine: str,
) -> list[Tensor]:
    """Run a schedule on tensors that :func:`can_run_taped` takes. Returns, for each recorded area, its states [T', N, C, H, W].

    ``engine``: as :func:`rnndyn_fast.ops.engines.choose_engine` takes it, or on a device
    :func:`rnndyn_fast.ops.device_engine.choose_device_engine`. Differentiable once, in reverse mode.
    """
    names = (*(node.name for node in schedule.network.inputs), *parameters)
    tensors = (*inputs, *parameters.values())
    wanted = {name for name, t in zip(names, tensors, strict=True) if t.requires_grad} if torch.is_grad_enabled() else set()
    with torch.no_grad(), on_its_device(inputs[0]):
        values = tensors[len(inputs) :]
        key = (schedule, engine, statistics is None, tuple(name in wanted for name in names))
        recording, tidies = recording_of(key, inputs, values)

        def start() -> TapedRun:
            run = TapedRun(schedule, inputs, parameters, statistics, engine, wanted)
            run.tidies = tidies or recorder() is not None
            return run

        if not wanted:
            if recording is None:
                states = start().outputs()
            else:
                found = run_inference(recording, inputs, values, lambda: _flat(start().outputs(), statistics))
                states = _states(found, statistics, recording)
            return [out.permute(0, 1, 4, 2, 3) for out in states]
        flight = Flight.begin(recording, inputs, values)
    return list(_Taped.apply(start, flight, statistics, names, len(inputs), *tensors))
