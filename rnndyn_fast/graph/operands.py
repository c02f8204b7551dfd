"""Inputs and parameters of one rollout, in the layouts that the kernels take: prepared once, used at every time step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnndyn_fast.graph.schedule import Drive, Schedule, Term
from rnndyn_fast.graph.spec import Activation, Input, Norm, Operator, Pool, pooled_shape
from rnndyn_fast.ops import _launch
from rnndyn_fast.ops.buffers import Arena, empty, sums_dtype
from rnndyn_fast.ops.channels_last import channels_last
from rnndyn_fast.ops.convolution import Weight
from rnndyn_fast.ops.device_engine import choose_device_engine
from rnndyn_fast.ops.engines import EngineChoice, choose_engine


@dataclass(frozen=True)
class AreaOperands:
    """What ``area_step`` needs of an area besides its terms."""

    gamma: Tensor | None  # [H, W, C], of the sums' dtype
    beta: Tensor | None  # [H, W, C]
    eps: float
    rectify: bool


class Operands:
    """Prepared inputs and parameters of a rollout."""

    def __init__(
        self, schedule: Schedule, inputs: Sequence[Tensor], parameters: Sequence[Tensor], engine: str = "auto", *, keep: bool = False
    ) -> None:
        self.schedule = schedule
        network = schedule.network
        self.parameters = dict(zip(network.parameter_shapes, parameters, strict=True))
        self.inputs = dict(zip((node.name for node in network.inputs), inputs, strict=True))
        example = inputs[0]
        self.dtype = example.dtype
        self.sums_dtype = sums_dtype(example.dtype)
        self.device = example.device
        self.on_device = _launch.on_device(example)
        self.samples = example.shape[1] if network.inputs[0].frames else example.shape[0]
        self.weights: list[Weight | None] = [self._weight(d, engine, keep) for d in schedule.drives]
        # Of the norms' parameters and their gradients: [H, W, C] each.
        affine = sum(4 * Arena.size(network.shapes[a.name], self.sums_dtype) for a in network.areas if a.norm is Norm.LAYER)
        self.affine_room = Arena(affine)
        self.areas = {a.name: self._area(a.name) for a in network.areas if schedule.num_slots[a.name]}
        self._biases: dict[tuple[str, ...], Tensor | None] = {}

    def _weight(self, drive: Drive, engine: str, keep: bool) -> Weight | None:
        c = drive.connection
        if c.operator is Operator.IDENTITY:
            return None
        weight = self.parameters[f"{c.parameter}.weight"]
        if self.on_device:
            choice = drive_device_engine(self.schedule, drive, self.dtype, engine, self.samples, self.device)
            return Weight(c.geometry, weight.to(self.dtype), choice)
        return Weight(c.geometry, weight, drive_engine(self.schedule, drive, self.dtype, engine, self.samples), keep=keep)

    def _area(self, name: str) -> AreaOperands:
        area = self.schedule.network.area(name)
        norm, shape = area.norm is Norm.LAYER, self.schedule.network.shapes[name]

        def affine(kind: str) -> Tensor | None:
            if not norm:
                return None
            parameter = self.parameters[f"{area.norm_parameter}.{kind}"].to(self.sums_dtype)
            channels, height, width = shape
            return channels_last(parameter.reshape(1, *shape), self.affine_room.take((1, height, width, channels), self.sums_dtype))[0]

        return AreaOperands(affine("weight"), affine("bias"), area.eps, area.activation is Activation.RELU)

    def bias(self, terms: Sequence[Term]) -> Tensor | None:
        """The sum of the terms' biases, [C]; None if none has one."""
        key = tuple(f"{t.connection.parameter}.bias" for t in terms if t.connection.bias)
        if key not in self._biases:
            values = [self.parameters[name].to(self.sums_dtype) for name in key]
            self._biases[key] = torch.stack(values).sum(0) if len(values) > 1 else values[0].contiguous() if values else None
        return self._biases[key]

    def ingest(self, node: Input, pool: Pool, slot: int) -> tuple[Tensor, Tensor | None]:
        """One form of an input's map, [N, H, W, C], and the argmax of its 2 x 2 maximum."""
        x = self.inputs[node.name][slot] if node.frames else self.inputs[node.name]
        x = x.permute(0, 2, 3, 1).contiguous()
        if pool is Pool.NONE:
            return x, None
        pooled, argmax = empty_form(x.shape, pool, self.dtype)
        area_step_forward([x], rectify=False, max_pooled=pooled if pool is Pool.MAX else None, argmax=argmax,
                          mean_pooled=pooled if pool is Pool.MEAN else None)  # fmt: skip
        return pooled, argmax


def drive_engine(schedule: Schedule, drive: Drive, dtype: torch.dtype, engine: str = "auto", samples: int = 16) -> EngineChoice:
    """The engine that computes a drive, and why."""
    c = drive.connection
    _, height, width = pooled_shape(schedule.network.shapes[drive.source], c.pool)
    return choose_engine(c.geometry, schedule.network.weight_shape(c), height, width, dtype, engine, samples, len(drive.slots))


def drive_device_engine(
    schedule: Schedule, drive: Drive, dtype: torch.dtype, engine: str, samples: int, device: torch.device | None
) -> EngineChoice:
    """The engine that computes a drive on a CUDA device, and why; without a device, what it would depend on."""
    c = drive.connection
    _, height, width = pooled_shape(schedule.network.shapes[drive.source], c.pool)
    return choose_device_engine(c.geometry, schedule.network.weight_shape(c), height, width, dtype, engine, samples, device)


def form_shape(shape: Sequence[int], pool: Pool) -> tuple[int, ...]:
    """Of a form of a map [..., H, W, C]."""
    *lead, h, w, c = shape
    return {Pool.NONE: (*lead, h, w, c), Pool.MAX: (*lead, h // 2, w // 2, c), Pool.MEAN: (*lead, 1, 1, c)}[pool]


def empty_form(shape: Sequence[int], pool: Pool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Buffers for a form of a map [..., H, W, C] and, for the 2 x 2 maximum, its argmax."""
    size = form_shape(shape, pool)
    return empty(size, dtype), empty(size, torch.uint8) if pool is Pool.MAX else None


def area_step_forward(
    drives: Sequence[Tensor],  # each [N, H, W, C]
    modulators: Sequence[Tensor] = (),  # each [N, H, W, C]
    *,
    drive_bias: Tensor | None = None,  # [C]
    modulator_bias: Tensor | None = None,  # [C]
    modulator_complete: bool = False,
    complete: bool = False,
    gamma: Tensor | None = None,  # [H, W, C]
    beta: Tensor | None = None,  # [H, W, C]
    eps: float = 1e-5,
    rectify: bool = True,
    **outputs: Tensor | None,
) -> None:
    """``area_step`` with any number of terms; ``outputs`` are the buffers of :func:`_launch.area_step_forward`."""
    names = ("value", "modulator_sum", "state", "max_pooled", "argmax", "mean_pooled", "mean", "rstd")
    _launch.area_step_forward(
        at_most(drives), at_most(modulators), drive_bias, modulator_bias, modulator_complete, gamma, beta, eps, rectify, complete,
        *(outputs.get(name) for name in names),
    )  # fmt: skip


def at_most(terms: Sequence[Tensor], limit: int = _launch.MAX_TERMS) -> list[Tensor]:
    """The terms, with those past what a kernel takes summed into one."""
    if len(terms) <= limit:
        return list(terms)
    rest = torch.stack(list(terms[limit - 1 :])).sum(0)
    return [*terms[: limit - 1], rest]
