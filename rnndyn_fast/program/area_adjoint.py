"""The backward pass of areas: one rule per kind of step that :mod:`rnndyn_fast.program.areas` notes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rnndyn_fast.graph.spec.network import Activation, Area, Interaction, Norm, Operator, Pool
from rnndyn_fast.ops import core
from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.ops.gate_step import ACTIVATION_NUMBERS, gate_scalars
from rnndyn_fast.program.area_steps import AreaStep, partial_size, pooled_key, pools_to
from rnndyn_fast.program.areas import ActivationStep, AliasStep, CellStep, NormStep, Port, Slots
from rnndyn_fast.program.gradients import BackwardPass
from rnndyn_fast.program.ir import Shape, View
from rnndyn_fast.program.maps import Key


class AreaAdjoint(BackwardPass):
    """The rules of areas."""

    # ---------------------------------------------------------------- ports

    def _grad_room(self, at: Slots, name: str, port: Port, total: View) -> View:
        """Where the gradient of a port's sum goes: the sum's own place, unless somebody may read that again."""
        if port.private and not self.preserve:
            return total
        if self.preserve or all(c.operator is Operator.IDENTITY for c in port.connections):
            return self.b.new(total.shape, total.dtype, f"{at.area.name} grad {name}")
        return self.forward.room(at.area.name, at.indices, f"grad {name}", total.shape[3])

    def _bias_row(self, port: Port, channels: int) -> View | None:
        """Where a kernel writes the gradient of a port's biases; None: it is not wanted, or not the kernel's."""
        return None if self.b.on_device else self.parameter_grads.row(port.biases, (channels,), self.forward.dtype)

    def _sum_channels(self, port: Port, grad: View) -> None:
        """A port's gradient summed over samples and pixels, to each of its biases."""
        row = self.parameter_grads.row(port.biases, (grad.shape[3],), sums_dtype(grad.dtype))
        if row is not None:
            self.b.emit("channel_sums", grad=grad, out=row)

    def _deposit(self, port: Port, grad: View, row: View | None = None) -> None:
        """A port's gradient goes to each of its terms, and to its biases, unless the kernel has summed it for them (``row``)."""
        if row is None:
            self._sum_channels(port, grad)  # (first: what owns the gradient may add to it)
        for keys in port.keys:
            for key, part in zip(keys, grad.parts(len(keys)), strict=True):
                self.grads.add(key, part, own=len(port.keys) == 1)

    def _gate_workspace(self, rows: Sequence[View | None], pixels: int, channels: int) -> View | None:
        if all(row is None for row in rows):
            return None
        return self.b.new((core.gate_workspace_size(pixels, channels),), torch.float32, "sums over pixels")

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
        grads = [None if p is None else self._norm_row(step, kind, p) for kind, p in (("weight", step.gamma), ("bias", step.beta))]
        drive, modulator = step.totals
        self.b.emit(
            "norm_step_backward", rule=rule, squash=drive is not None and modulator is not None, grad_state=grad, drive=drive,
            modulator=modulator, gamma=step.gamma, beta=step.beta, mean=step.mean, rstd=step.rstd, grad_drive=rooms[0],
            grad_modulator=rooms[1], grad_gamma=grads[0], grad_beta=grads[1], grad_drive_bias=rows[0], grad_modulator_bias=rows[1],
            workspace=self.forward.rules.norm_workspace(step.shape, rule),
        )  # fmt: skip
        for (_, port, _), room, row in zip(named, rooms, rows, strict=True):
            if room is not None:
                self._deposit(port, room, row)

    def _norm_row(self, step: NormStep, kind: str, parameter: View) -> View:
        """Where the gradient of gamma or beta goes, wanted or not."""
        row = self.parameter_grads.row([f"{step.prefix}.{kind}"], parameter.shape, parameter.dtype)
        return self.b.new(parameter.shape, parameter.dtype, f"{step.prefix} grad") if row is None else row

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
            "area_step_backward", height=shape[1], width=shape[2], grad_states=b.at_most(state, core.MAX_TERMS),
            grad_max_pooled=maximum, argmax=step.argmax if maxima else None, grad_mean_pooled=pooled[Pool.MEAN],
            multiplicative=multiplicative, value=step.value, drives=b.at_most(step.drives, core.MAX_TERMS) if multiplicative else [],
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
            self._sum_channels(port, grad)
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

    def _affine_grads(self, area: Area) -> tuple[View | None, View | None]:
        """Where the kernel adds up the gradients of gamma and beta, [H, W, C]."""
        if area.norm is not Norm.LAYER:
            return None, None
        found = []
        channels, height, width = self.network.shapes[area.name]
        for kind in ("weight", "bias"):
            name = f"{area.norm_parameter}.{kind}"
            known = self.parameter_grads.maps_last
            if name not in known:
                known[name] = self.b.zeros((height, width, channels), self.forward.sums_dtype, f"{name} grad")
                self.parameter_grads.add(name, known[name].permute(2, 0, 1), own=True)
            found.append(known[name])
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
