"""The backward pass of a rollout: what was done, walked back, one rule per kind of step.

A gradient belongs to a key, whatever it is of (:func:`rnndyn_fast.program.maps.map_key`). What forward keeps is what these rules read;
large states are computed again instead (:class:`rnndyn_fast.program.maps.Remade`). With ``preserve`` nothing that forward kept is
overwritten, so that the pass can be run again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rnndyn_fast.graph.schedule import Drive
from rnndyn_fast.graph.spec import Activation, Area, Interaction, Norm, Operator, Pool
from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.ops.gate_step import ACTIVATION_NUMBERS, gate_scalars
from rnndyn_fast.program.area_steps import AreaStep, partial_size, pooled_key, pools_to
from rnndyn_fast.program.areas import ActivationStep, AliasStep, CellStep, NormStep, Port, Slots
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Shape, View
from rnndyn_fast.program.linear import Dense, Into
from rnndyn_fast.program.lower import ComponentStep, Lowering
from rnndyn_fast.program.maps import FEW_STEPS, Key, PoolStep, Remade, ResizeStep, TorchStep, map_key, term_key
from rnndyn_fast.program.terms import LARGE_PACKED, LinearStep, Reading


class Gradients:
    """Sums of gradients by key: of each a summand that others may read too, and the sum of those that are the key's own, in the first one's
    place. They are added up when the sum is taken, or by the kernel that reads them."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self._found: dict[Key, tuple[View | None, View | None]] = {}

    def add(self, key: Key, grad: View, *, own: bool) -> None:
        """One summand; of the key None, which is nothing's, it is dropped. ``own``: it is contiguous, and nobody else reads it."""
        if key is None:
            return
        shared, ours = self._found.get(key, (None, None))
        if ours is not None:
            self.b.emit("add", a=ours, b=grad, out=ours)
        elif own:
            ours = grad
        elif shared is None:
            shared = grad
        else:
            ours = self.b.sum_of(shared, grad, "sum of gradients")
            shared = None
        self._found[key] = shared, ours

    def own(self, key: Key) -> View | None:
        """The sum of the summands that are the key's own, to be added to; None: there is none yet."""
        return self._found.get(key, (None, None))[1]

    def parts(self, key: Key) -> list[View]:
        """What adds up to the sum: nothing, one map or two, contiguous. Gone afterwards."""
        return [self.b.maps_last(part, "gradient") for part in self._found.pop(key, (None, None)) if part is not None]

    def take(self, key: Key) -> tuple[View | None, bool]:
        """The sum, contiguous, and whether it is the taker's own; None: nothing came. Gone afterwards."""
        shared, ours = self._found.pop(key, (None, None))
        if ours is not None:
            if shared is not None:
                self.b.emit("add", a=ours, b=shared, out=ours)
            return ours, True
        return (None, False) if shared is None else (self.b.maps_last(shared, "gradient"), not shared.is_contiguous)


class Adjoint:
    """Of one rollout; instructions go to the rollout's builder.

    ``grads``: of the recorded states, [T', N, C, H, W] each, or None.
    """

    def __init__(self, forward: Lowering, grads: Sequence[View | None], *, preserve: bool) -> None:
        self.forward, self.b, self.preserve = forward, forward.b, preserve
        self.schedule, self.network, self.wanted, self.reaches = forward.schedule, forward.network, forward.wanted, forward.reaches
        self.grads = Gradients(self.b)
        self.given = grads
        self.parameter_grads: dict[str, View] = {}
        self._summed: set[str] = set()  # names of those gradients that are sums already
        self._results: dict[str, View] = {}
        self.collected: defaultdict[int, list[tuple[Sequence[Reading], list[View]]]] = defaultdict(list)
        self._made: dict[Key, View] = {}  # states that were made again
        self._latest: tuple[tuple[Key, ...], View] | None = None
        self._sums: dict[Key, View] = {}  # of gradients of terms that several steps read
        self._affine: dict[str, View] = {}  # gradients of norms' parameters, [H, W, C]
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
        found = {name: self._parameter_result(name) for name in self.parameter_grads}
        for name in self.forward.inputs:
            if name in self.wanted:
                found[name] = self._input_grad(name)
        self.forward.blocks = self._blocks
        return found

    # ---------------------------------------------------------------- parameters

    def _result_room(self, name: str, shape: Shape) -> View | None:
        """The caller's tensor for a parameter's gradient, while nothing is there."""
        parameter = self.forward.parameters[name]
        if name in self.parameter_grads or name not in self.wanted or parameter.shape != shape:
            return None
        if name not in self._results:
            self._results[name] = self.forward.result(f"{name} grad", parameter.shape, parameter.dtype)
        return self._results[name]

    def _parameter_result(self, name: str) -> View:
        grad, parameter = self.parameter_grads[name], self.forward.parameters[name]
        if name not in self._results:
            self._results[name] = self.forward.result(f"{name} grad", parameter.shape, parameter.dtype)
        result = self._results[name]
        if grad.value is not result.value:
            if name in self._affine and not self.b.on_device and result.dtype == grad.dtype:
                channels, height, width = grad.shape
                last = self._affine[name].reshape(1, height * width, 1, channels)  # (the same launch, the other way round)
                self.b.channels_last(last, result.reshape(1, 1, channels, height * width))
                return result
            if grad.shape != result.shape:
                grad = self.b.contiguous(grad, f"{name} grad").reshape(*result.shape)
            self.b.emit("copy", x=grad, out=result)
        return result

    def own_parameter(self, name: str) -> View | None:
        """The sum of a parameter's gradient so far, to be added to; None: there is none yet, or somebody else may read it."""
        return self.parameter_grads[name] if name in self._summed else None

    def add_parameter(self, name: str, grad: View, *, own: bool = False) -> None:
        """One summand of a parameter's gradient, if that is wanted. ``own``: nobody else reads it; it may be the sum so far itself, to
        which the summand was added."""
        there = self.parameter_grads.get(name)
        if name not in self.wanted or (there is not None and grad.same_place(there)):
            return
        if grad.dtype != sums_dtype(grad.dtype):
            grad, own = self.b.converted(grad, sums_dtype(grad.dtype), f"{name} grad"), True
        if there is None:
            self.parameter_grads[name] = grad
            self._summed.update([name] if own else [])
            return
        if there.shape != grad.shape:
            grad = self.b.contiguous(grad, f"{name} grad").reshape(*there.shape)
        if name in self._summed:
            self.b.emit("add", a=there, b=grad, out=there)
        else:  # (the first one may be somebody else's too)
            self.parameter_grads[name] = self.b.sum_of(there, grad, f"{name} grad")
            self._summed.add(name)

    def _into(self, x: View | None = None) -> Into:
        return Into(self.own_parameter, self._result_room, x)

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

    # ---------------------------------------------------------------- states that are made again

    def read(self, reading: View | Remade) -> View:
        """The map of a reading."""
        if isinstance(reading, View):
            return reading
        remakers = self.forward.remakers
        if reading.key in remakers.forms:
            return remakers.forms[reading.key]()
        if reading.key not in self._made:
            self._made[reading.key] = remakers.states[reading.key](None)
        return self._made[reading.key]

    def _is_late(self, x: Reading) -> bool:
        return isinstance(x, Remade) and x.key in self.forward.remakers.late

    def _made_late(self, keys: tuple[Key, ...]) -> View:
        """Maps that can be made at any time, one after another; those of the latest call are there for the next reader."""
        if self._latest is None or self._latest[0] != keys:
            make = self.forward.remakers.late
            if len(keys) == 1:
                made = make[keys[0]](None)
            else:
                first = make[keys[0]]
                shape = self._late_shape(keys[0])
                made = self.b.new((len(keys) * shape[0], *shape[1:]), self.forward.dtype, "made again")
                for key, part in zip(keys, made.parts(len(keys)), strict=True):
                    make[key](part)
                del first
            self._latest = keys, made
        return self._latest[1]

    def _late_shape(self, key: Key) -> Shape:
        assert key is not None
        pooled = key[0] == "pooled"
        channels, height, width = self.network.shapes[key[2][1] if pooled else key[1]]
        return (self.forward.samples, height // 2 if pooled else height, width // 2 if pooled else width, channels)

    def forget(self, keys: Sequence[Key]) -> None:
        """States that nothing reads for a while: they are made once more then."""
        for key in keys:
            self._made.pop(key, None)

    # ---------------------------------------------------------------- maps

    def _pool(self, step: PoolStep) -> None:
        grad, _ = self.grads.take(step.key)
        if grad is None:
            return
        out = self.b.new(step.shape, grad.dtype, "pooling grad")
        pooled = dict(grad_max_pooled=grad, argmax=step.argmax) if step.argmax is not None else dict(grad_mean_pooled=grad)
        self.b.emit("area_step_backward", shape=step.shape, dtype=grad.dtype, grad_drive=out, **pooled)
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
            self.add_parameter(name, grad, own=True)

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
                x, self.b.stacked(grads, "gradients"), self._into(into), need_x=need_x, need_weight=need_weight
            )
            for name, grad_weight in found_weights:
                self.add_parameter(name, grad_weight, own=True)
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
        there = self.own_parameter(self.schedule.drives[index].connection.weights[-1]) is not None
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
                _, found = linear.backward(x, self.b.stacked(grads, "gradients"), self._into(), need_x=False, need_weight=True)
                for name, grad in found:
                    self.add_parameter(name, grad, own=True)

    # ---------------------------------------------------------------- areas

    def _grad_room(self, at: Slots, name: str, port: Port, total: View) -> View:
        """Where the gradient of a port's sum goes: the sum's own place, unless somebody may read that again."""
        if port.private and not self.preserve:
            return total
        if self.preserve or all(c.operator is Operator.IDENTITY for c in port.connections):
            return self.b.new(total.shape, total.dtype, f"{at.area.name} grad {name}")
        return self.forward.room(at.area.name, at.indices, f"grad {name}", total.shape[3])

    def _bias_row(self, port: Port, channels: int) -> View | None:
        """Where a kernel writes the gradient of a port's biases; None: it is not wanted, or not the kernel's."""
        if self.b.on_device or not any(name in self.wanted for name in port.biases):
            return None
        return self.b.new((channels,), self.forward.dtype, f"{' + '.join(port.biases)} grad")

    def _deposit(self, port: Port, grad: View, row: View | None = None) -> None:
        """A port's gradient goes to each of its terms, and its sum over samples and pixels, ``row``, to each of its biases."""
        biases = [name for name in port.biases if name in self.wanted]
        if biases:
            if row is None:
                row = self.b.new((grad.shape[3],), sums_dtype(grad.dtype), f"{' + '.join(biases)} grad")
                self.b.emit("channel_sums", grad=grad, out=row)  # (first: what owns the gradient may add to it)
            for name in biases:
                self.add_parameter(name, row)
        for keys in port.keys:
            for key, part in zip(keys, grad.parts(len(keys)), strict=True):
                self.grads.add(key, part, own=len(port.keys) == 1)

    def _parts(self, keys: Sequence[Key], shape: Shape) -> list[View]:
        """What adds up to the gradient of a state over some slots: nothing, one map or two."""
        if len(keys) == 1:
            return self.grads.parts(keys[0])
        grad = self._take(keys, shape)
        return [] if grad is None else [grad]

    def _take(self, keys: Sequence[Key], shape: Shape) -> View | None:
        """The gradient of a state over some slots; None: none of it."""
        found = [self.grads.take(key)[0] for key in keys]
        if all(grad is None for grad in found):
            return None
        zero = None
        if any(grad is None for grad in found):
            zero = self.b.zeros((shape[0] // len(keys), *shape[1:]), self.forward.dtype)
        return self.b.stacked([grad if grad is not None else zero for grad in found], "gradients")  # type: ignore[misc]

    def _gate_workspace(self, rows: Sequence[View | None], pixels: int, channels: int) -> View | None:
        if all(row is None for row in rows):
            return None
        return self.b.new((_launch.gate_workspace_size(pixels, channels),), torch.float32, "sums over pixels")

    def _cell(self, step: CellStep) -> None:
        at, cell = step.at, step.at.area.cell
        assert cell is not None
        shape: Shape | None = None
        names = [name for name, _ in step.ports]
        n = len(at.indices) * self.forward.samples
        channels, height, width = self.network.shapes[at.area.name]
        shape = (n, height, width, channels)
        grads = [self._parts(at.keys(state), shape) for state in cell.states]
        if not any(grads):
            return
        totals = [total if isinstance(total, View) else total() for total in step.totals]
        full = [parts[0] if parts else self.b.zeros(shape, self.forward.dtype) for parts in grads]
        more: list[View | None] = [parts[1] if len(parts) > 1 else None for parts in grads]
        if self.b.on_device:
            full = [f if m is None else self.b.sum_of(f, m, "gradient of a state") for f, m in zip(full, more, strict=True)]
            more = [None] * len(full)
        ports = [port for _, port in step.ports]
        rooms = [self._grad_room(at, name, port, total) for name, port, total in zip(names, ports, totals, strict=True)]
        rows = [self._bias_row(port, total.shape[3]) for port, total in zip(ports, totals, strict=True)]
        workspace = self._gate_workspace(rows, math.prod(shape[:3]), sum(total.shape[3] for total in totals))
        self.b.emit(
            "gate_step_backward", scalars=gate_scalars(cell), ports=totals, grads=full, more=more, grad_ports=rooms, grad_biases=rows,
            workspace=workspace,
        )  # fmt: skip
        for port, room, row in zip(ports, rooms, rows, strict=True):
            self._deposit(port, room, row)

    def _norm(self, step: NormStep) -> None:
        at, rule = step.at, step.rule
        self.forget(at.keys(None))
        grad = self._take(at.keys(None), step.shape)
        if grad is None:
            return
        named = (("drive", step.drive, step.totals[0]), ("modulator", step.modulator, step.totals[1]))
        rooms = [None if total is None else self._grad_room(at, name, port, total) for name, port, total in named]
        rows = [None if room is None else self._bias_row(port, room.shape[3]) for (_, port, _), room in zip(named, rooms, strict=True)]
        grads = [None if p is None else self.b.new(p.shape, p.dtype, f"{step.prefix} grad") for p in (step.gamma, step.beta)]
        drive, modulator = step.totals
        self.b.emit(
            "norm_step_backward", rule=rule, squash=drive is not None and modulator is not None, grad_state=grad, drive=drive,
            modulator=modulator, gamma=step.gamma, beta=step.beta, mean=step.mean, rstd=step.rstd, grad_drive=rooms[0],
            grad_modulator=rooms[1], grad_gamma=grads[0], grad_beta=grads[1], grad_drive_bias=rows[0], grad_modulator_bias=rows[1],
            workspace=self.forward.rules.norm_workspace(step.shape, rule),
        )  # fmt: skip
        for kind, value in zip(("weight", "bias"), grads, strict=True):
            if value is not None:
                self.add_parameter(f"{step.prefix}.{kind}", value, own=True)
        for (_, port, _), room, row in zip(named, rooms, rows, strict=True):
            if room is not None:
                self._deposit(port, room, row)

    # ---------------------------------------------------------------- area_step

    def _area(self, step: AreaStep) -> None:
        at, area, b, shape = step.at, step.at.area, self.b, step.shape
        state = self._parts(at.keys(None), shape)
        pooled = {pool: self._pooled_grad(at, pool, shape) for pool in (Pool.MAX, Pool.MAX_SAME, Pool.MEAN) if pools_to(pool, *shape[1:3])}
        maxima = [g for pool, g in pooled.items() if g is not None and pool is not Pool.MEAN]
        if not state and not maxima and pooled[Pool.MEAN] is None:
            return
        maximum = b.sum_of(maxima[0], maxima[1], "pooled grad") if len(maxima) == 2 else maxima[0] if maxima else None
        multiplicative, normed = area.interaction is Interaction.MULTIPLICATIVE, area.norm is Norm.LAYER
        sums_drive, own_drive = self._shared_and_own(step.drive)
        sums_modulator, own_modulator = self._shared_and_own(step.modulator)
        grad_drive = grad_modulator = None
        if own_drive:
            grad_drive = self.forward.room(area.name, at.indices, "grad drive", shape[3])
        elif normed or len(sums_drive) > 1 or step.drive.biases:
            grad_drive = b.new(shape, self.forward.dtype, f"{area.name} grad")
        if step.modulator_sum is not None and step.modulator.keys:
            grad_modulator = self.forward.room(area.name, at.indices, "grad modulator", shape[3])
        gamma, beta = self._affine_grads(area)
        b.emit(
            "area_step_backward", shape=shape, dtype=self.forward.dtype, grad_states=b.at_most(state, _launch.MAX_TERMS),
            grad_max_pooled=maximum, argmax=step.argmax if maxima else None, grad_mean_pooled=pooled[Pool.MEAN],
            multiplicative=multiplicative, value=step.value, drives=b.at_most(step.drives, _launch.MAX_TERMS) if multiplicative else [],
            drive_bias=step.drive_bias, modulator_sum=step.modulator_sum, mean=step.mean, rstd=step.rstd, gamma=step.gamma, beta=step.beta,
            rectify=area.activation is Activation.RELU, grad_drive=grad_drive, grad_drive_sum=sums_drive[0] if sums_drive else None,
            grad_modulator=grad_modulator, grad_gamma=gamma, grad_beta=beta,
            partial=b.new(partial_size(shape), torch.float64, "partial sums") if normed and not b.on_device else None,
        )  # fmt: skip
        for total, grad in [*((s, grad_drive) for s in sums_drive[1:]), *((s, grad_modulator) for s in sums_modulator)]:
            b.emit("add", a=total, b=grad, out=total)
        for port, own, grad in ((step.drive, own_drive, grad_drive), (step.modulator, own_modulator, grad_modulator)):
            if grad is None:
                continue
            for name in port.biases:
                if name in self.wanted:
                    row = b.new((shape[3],), sums_dtype(grad.dtype), f"{name} grad")
                    b.emit("channel_sums", grad=grad, out=row)
                    self.add_parameter(name, row, own=True)
            for keys in own:
                for key, part in zip(keys, grad.parts(len(keys)), strict=True):
                    self.grads.add(key, part, own=len(port.keys) == 1)

    def _shared_and_own(self, port: Port) -> tuple[list[View], list[list[Key]]]:
        """Of a port's terms: where gradients of those that several steps read gather, and the keys of the others."""
        sums = [self._sum_of(keys) for keys in port.keys]
        own = [keys for keys, total in zip(port.keys, sums, strict=True) if total is None]
        return [total for total in sums if total is not None], own

    def _pooled_grad(self, at: Slots, pool: Pool, shape: Shape) -> View | None:
        n, h, w, c = shape
        keys = [pooled_key(at, slot, pool) for slot in at.indices]
        return self._take(keys, (n, 1, 1, c) if pool is Pool.MEAN else (n, h // 2, w // 2, c))

    def _take_term(self, key: Key) -> View | None:
        """The gradient of a term."""
        total = self._sums.pop(key, None)
        if total is None or total.dtype == self.forward.dtype:
            return self.grads.take(key)[0]
        return self.b.converted(total, self.forward.dtype, "gradient of several steps")

    def _sum_of(self, keys: Sequence[Key]) -> View | None:
        """Where the gradient of a term that several steps read gathers; None: only one does."""
        if len(keys) != 1 or keys[0] is None or keys[0][0] != "term" or self.forward.uses[keys[0][1:]] < 2:
            return None
        key = keys[0]
        if key not in self._sums:
            channels, height, width = self.schedule.drives[key[1]].shape
            total = self.b.zeros((self.forward.samples, height, width, channels), self.forward.sums_dtype, "gradient of several steps")
            self._sums[key] = total
            if self.forward.sums_dtype == self.forward.dtype:
                self.grads.add(key, total, own=True)
        return self._sums[key]

    def _affine_grads(self, area: Area) -> tuple[View | None, View | None]:
        """Where the kernel adds up the gradients of gamma and beta, [H, W, C]."""
        if area.norm is not Norm.LAYER:
            return None, None
        found = []
        channels, height, width = self.network.shapes[area.name]
        for kind in ("weight", "bias"):
            name = f"{area.norm_parameter}.{kind}"
            if name not in self._affine:
                self._affine[name] = self.b.zeros((height, width, channels), self.forward.sums_dtype, f"{name} grad")
                self.add_parameter(name, self._affine[name].permute(2, 0, 1), own=True)
            found.append(self._affine[name])
        return found[0], found[1]

    def _alias(self, step: AliasStep) -> None:
        (keys,) = step.drive.keys
        for state_key, key in zip(step.at.keys(None), keys, strict=True):
            grad, own = self.grads.take(state_key)
            if grad is not None:
                self.grads.add(key, grad, own=own)

    def _activation(self, step: ActivationStep) -> None:
        at, state = step.at, step.state
        assert at.area.activation is not None
        parts = self._parts(at.keys(None), state.shape)
        if not parts:
            return
        channels = state.shape[3]
        preserved = self.preserve and self.b.new(state.shape, state.dtype, f"{at.area.name} grad drive")
        room = preserved or self.forward.room(at.area.name, at.indices, "grad drive", channels)
        row = self._bias_row(step.drive, channels)
        number = ACTIVATION_NUMBERS[at.area.activation]
        if self.b.on_device:
            grad = parts[0] if len(parts) == 1 else self.b.sum_of(parts[0], parts[1], "gradient of a state")
            self.b.emit("activation_slope", activation=number, grad=grad, state=state, grad_drive=room)
        else:
            workspace = self._gate_workspace([row], math.prod(state.shape[:3]), channels)
            more = parts[1] if len(parts) > 1 else None
            self.b.emit(
                "activation_backward", activation=number, grad=parts[0], more=more, state=state, grad_drive=room, grad_bias=row,
                workspace=workspace,
            )  # fmt: skip
        self._deposit(step.drive, room, row)
