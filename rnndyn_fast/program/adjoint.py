"""The backward pass of a rollout: what was done, walked back, one rule per kind of step.

A gradient belongs to a key, whatever it is of (:func:`rnndyn_fast.program.maps.map_key`). What forward keeps is what these rules read;
large states are computed again instead (:class:`rnndyn_fast.program.maps.Remade`). With ``preserve`` nothing that forward kept is
overwritten, so that the pass can be run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rnndyn_fast.graph.schedule import Drive
from rnndyn_fast.program.area_adjoint import AreaAdjoint
from rnndyn_fast.program.area_steps import AreaStep
from rnndyn_fast.program.areas import ActivationStep, AliasStep, CellStep, NormStep
from rnndyn_fast.program.ir import View
from rnndyn_fast.program.linear import Dense, Into
from rnndyn_fast.program.lower import ComponentStep, Lowering
from rnndyn_fast.program.maps import FEW_STEPS, PoolStep, Remade, ResizeStep, TorchStep, map_key, term_key
from rnndyn_fast.program.terms import LARGE_PACKED, LinearStep, Reading


class Adjoint(AreaAdjoint):
    """The whole of it."""

    def __init__(self, forward: Lowering, grads: Sequence[View | None], *, preserve: bool) -> None:
        super().__init__(forward, grads, preserve=preserve)
        self._blocks = forward.blocks  # (windows of gradients begin anew)
        forward.blocks = {}
        self._rules: dict[type, Callable[[Any], None]] = {
            PoolStep: self._pool, ResizeStep: self._resize, TorchStep: self._torch, LinearStep: self._linear, CellStep: self._cell,
            NormStep: self._norm, AliasStep: self._alias, ActivationStep: self._activation, ComponentStep: self._component,
            AreaStep: self._area,
        }  # fmt: skip

    def run(self) -> dict[str, View]:
        """Emit the pass. Returns the gradients that are wanted, by name, as tensors of the caller's; others are zero everywhere."""
        for linear in self.forward.packed.values():
            if linear is not None and linear.dense is not None:
                linear.dense.drop_packed()
                linear.dense.drop_layout()
        for name, grad in zip(self.schedule.record, self.given, strict=True):
            if grad is not None:
                area = self.network.recorded(name)[0]
                steps = grad.permute(0, 1, 3, 4, 2)
                same = grad.strides[0] == 0  # (a sum over time: the same at every step)
                first = self.b.contiguous(steps[0], f"{name} gradient") if same else None
                for t, slot in enumerate(self.schedule.slot_of[area][self.schedule.first_step[name] :]):
                    self.grads.add(self.forward.recorded_key(name, slot), steps[t] if first is None else first, own=False)
        for step in reversed(self.forward.steps):
            self._rules[type(step)](step)
        self.forward.blocks = {}
        for linear in self.forward.packed.values():
            if linear is not None and linear.dense is not None:
                linear.dense.drop_packed()
        self.weights_back(list(self.collected))
        found = self.parameter_grads.finish()
        for name in self.forward.inputs:
            if name in self.wanted:
                found[name] = self._input_grad(name)
        self.forward.blocks = self._blocks
        return found

    def _input_grad(self, name: str) -> View:
        """[N, C, H, W], or [T, N, C, H, W] of frames."""
        node, x = self.forward.nodes[name], self.forward.inputs[name]
        result = self.forward.result(f"{name} grad", x.shape, x.dtype)
        for slot in range(self.schedule.timesteps) if node.frames else (0,):
            grad, _ = self.grads.take(map_key(name, slot, None))
            out = result[slot] if node.frames else result
            if grad is None:
                self.b.emit("fill", out=out, value=0.0)
            else:
                self.b.emit("copy", x=grad.permute(0, 3, 1, 2), out=out)
        return result

    # ---------------------------------------------------------------- maps

    def _pool(self, step: PoolStep) -> None:
        grad, _ = self.grads.take(step.key)
        if grad is None:
            return
        out = self.b.new(step.shape, grad.dtype, "pooling grad")
        pooled = dict(grad_max_pooled=grad, argmax=step.argmax) if step.argmax is not None else dict(grad_mean_pooled=grad)
        self.b.emit("area_step_backward", height=step.shape[1], width=step.shape[2], grad_drive=out, **pooled)
        self.grads.add(step.source, out, own=True)

    def _resize(self, step: ResizeStep) -> None:
        grad, _ = self.grads.take(step.key)
        if grad is not None:
            out = self.b.new(step.shape, grad.dtype, "resizing grad")
            self.b.emit("resize_backward", grad=grad, out=out)
            self.grads.add(step.source, out, own=True)

    def _torch(self, step: TorchStep) -> None:
        grads = [self.grads.take(key)[0] for key in step.results]
        if all(grad is None for grad in grads):
            return
        grad_xs = [None if key is None else self.b.new(x.shape, x.dtype, "grad") for key, x in zip(step.sources, step.xs, strict=True)]
        own = {name: self.b.new(p.shape, p.dtype, f"{name} grad") for name, p in step.parameters.items() if name in self.wanted}
        if not own and all(x is None for x in grad_xs):
            return
        self.b.emit(
            "by_torch_backward", function=step.function, xs=step.xs, parameters=step.parameters, grads=grads, grad_xs=grad_xs,
            grad_parameters=own, inner=step.inner,
        )  # fmt: skip
        for key, grad in zip(step.sources, grad_xs, strict=True):
            if grad is not None:
                self.grads.add(key, grad, own=True)
        for name, grad in own.items():
            self.parameter_grads.add(name, grad, own=True)

    # ---------------------------------------------------------------- linear maps

    def _linear(self, step: LinearStep) -> None:
        forward, index, keys, need_weight = self.forward, step.drive, step.keys, step.need_weight
        drive, linear = self.schedule.drives[index], forward.linear.get(index)
        assert linear is not None
        found = [self._take_term(term_key(index, step.first + k)) for k in range(len(step.xs))]
        if all(grad is None for grad in found):
            return
        channels, height, width = drive.shape
        zero = None
        if any(grad is None for grad in found):
            zero = self.b.zeros((forward.samples, height, width, channels), forward.dtype)
        grads: list[View] = [zero if grad is None else grad for grad in found]  # type: ignore[misc]
        if linear.postponed and need_weight and (index in forward.postponed or self._waits(index)):
            # (What is made again is made now: later the way back has gone past what it is made from.)
            xs = [x if isinstance(x, int) or self._is_late(x) else self.read(x) for x in step.xs]
            self.collected[index].append((xs, grads))
            need_weight = False
            if self._collected_slots(index) >= forward.window(drive.connection.target) and self._is_due(index):
                self.weights_back((index,))
        need_x = drive.source in self.reaches
        if need_x or need_weight:
            x = self._read(drive, step.xs, shape_only=not need_weight)
            into = self.grads.own(keys[0]) if need_x and len(keys) == 1 else None
            grad_x, found_weights = linear.backward(
                x, self.b.stacked(grads, "gradients"), Into(self.parameter_grads, into), need_x=need_x, need_weight=need_weight
            )
            for name, grad_weight in found_weights:
                self.parameter_grads.add(name, grad_weight, own=True)
            if grad_x is not None and grad_x is not into:
                for key, part in zip(keys, grad_x.parts(len(keys)), strict=True):
                    self.grads.add(key, part, own=True)
            if self.network.delay(drive.connection) > 0 and forward.window(drive.source) == 1:
                self.forget(keys)
                forward.blocks.pop((drive.source, "again None"), None)
        if linear.dense is not None and (self._packs_for_each(drive, linear.dense) or (
            step.first == 0 and sum(other is linear for other in forward.linear.values()) == 1
        )):  # fmt: skip
            linear.dense.drop_packed()  # (of the last step: what is left is its weight's gradient)

    def _packs_for_each(self, drive: Drive, weight: Dense) -> bool:
        """Whether the way back packs a weight for each time step: a large one, beside others, that few steps read."""
        return (
            len(drive.slots) <= FEW_STEPS
            and weight.packed_bytes >= LARGE_PACKED
            and len(self.schedule.components[self.forward.component_of[drive.connection.target]].drives_within) > 1
        )

    def _read(self, drive: Drive, xs: Sequence[Reading], *, shape_only: bool = False) -> View:
        """What a drive read, [len(xs) * N, H, W, C]; where only its shape matters, perhaps with any values."""
        if shape_only and not isinstance(xs[0], View):
            channels, (height, width) = self.network.shapes[drive.source][0], self.network.read_size(drive.connection)
            return self.b.new((len(xs) * self.forward.samples, height, width, channels), self.forward.dtype, "only a shape")
        if isinstance(xs[0], int):
            return self.forward.shown(drive.source, xs)  # type: ignore[arg-type]
        if all(self._is_late(x) for x in xs):
            return self._made_late(tuple(x.key for x in xs if isinstance(x, Remade)))
        return self.b.stacked([self.read(x) for x in xs if not isinstance(x, int)], f"{drive.source} steps")

    def _component(self, step: ComponentStep) -> None:
        """At the first step of a component: packed weights are not read any more, and the rest of the weights' gradients is taken."""
        self.forward.drop_blocks(step.areas)
        for index in step.drives:
            linear = self.forward.linear.get(index)
            if linear is not None and linear.dense is not None:
                linear.dense.drop_packed()
        self.weights_back([index for index in step.drives if self._is_due(index)])

    def _collected_slots(self, index: int) -> int:
        return sum(len(some) for some, _ in self.collected.get(index, ()))

    def _is_due(self, index: int) -> bool:
        """Whether a weight's gradient is there already, or would take no more memory than the maps that it is made of; else it waits for
        more of them, or for the end of the way back."""
        linear = self.forward.linear.get(index)
        if linear is None or linear.dense is None:
            return True
        there = self.parameter_grads.is_there(self.schedule.drives[index].connection.weights[-1])
        return there or self._elements(index) * self._collected_slots(index) >= math.prod(linear.dense.shape)

    def _elements(self, index: int) -> int:
        """Of the maps that a drive reads and makes at one slot."""
        drive = self.schedule.drives[index]
        height, width = self.network.read_size(drive.connection)
        return self.forward.samples * (height * width * self.network.shapes[drive.source][0] + math.prod(drive.shape))

    def _waits(self, index: int) -> bool:
        """Whether a weight's gradient waits for the end of the way back, whatever is collected of its maps (:meth:`_is_due`)."""
        linear = self.forward.linear.get(index)
        slots = len(self.schedule.drives[index].slots)
        return linear is not None and linear.dense is not None and self._elements(index) * slots < math.prod(linear.dense.shape)

    def weights_back(self, drives: Sequence[int]) -> None:
        """The gradients of weights within a component, over a window of its steps, or what is left."""
        for index in drives:
            pairs = self.collected.pop(index, [])[::-1]
            if pairs:
                linear = self.forward.linear[index]
                assert linear is not None
                xs = [x for some, _ in pairs for x in some]
                grads = [grad for _, some in pairs for grad in some]
                x = self._read(self.schedule.drives[index], xs)
                _, found = linear.backward(
                    x, self.b.stacked(grads, "gradients"), Into(self.parameter_grads), need_x=False, need_weight=True
                )
                for name, grad in found:
                    self.parameter_grads.add(name, grad, own=True)
