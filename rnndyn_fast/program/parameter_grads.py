"""Gradients of parameters while the backward pass is written: each is a sum of what many time steps give.

Small summands (of biases, norms, depthwise kernels) are written side by side, as rows, and summed in one instruction; large ones are
added up by the kernels that make them, in the caller's tensor where that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.program.ir import Shape, View, contiguous_strides
from rnndyn_fast.program.lower import Lowering

_MOST_ROWS = 16  # that are summed at a time
_MOST_IN_ROW = 4096  # elements, beyond which a summand is added to the sum right away
_ALIGNED = 16  # elements: rows begin where kernels like to write


@dataclass
class _Rows:
    """Summands of one shape. ``order``: the permutation of dimensions after which they are the parameter's gradient."""

    block: View  # [rows, elements]
    shape: Shape
    order: tuple[int, ...] | None
    used: int = 0

    def row(self) -> View:
        """The next one."""
        self.used += 1
        return View(
            self.block.value, self.shape, contiguous_strides(self.shape), self.block.offset + (self.used - 1) * self.block.strides[0]
        )

    def all(self) -> View:
        """Those that are used, [used, *shape]."""
        return View(self.block.value, (self.used, *self.shape), (self.block.strides[0], *contiguous_strides(self.shape)))


RowKey = tuple[tuple[str, ...], Shape, torch.dtype]


class ParameterGrads:
    """Of one backward pass."""

    def __init__(self, forward: Lowering) -> None:
        self.forward, self.b, self.wanted = forward, forward.b, forward.wanted
        self._found: dict[str, View] = {}
        self._summed: set[str] = set()  # names of those gradients that are sums already
        self._results: dict[str, View] = {}
        self._rows: dict[RowKey, _Rows] = {}
        self._parts: dict[tuple[str, tuple[int, int]], View] = {}  # of some input channels
        self.maps_last: dict[str, View] = {}  # gradients of norms' parameters, [H, W, C]

    # ---------------------------------------------------------------- summands

    def add(self, name: str, grad: View, *, own: bool = False) -> None:
        """One summand, if the gradient is wanted. ``own``: nobody else reads it; it may be the sum so far itself, to which the summand was
        added."""
        there = self._found.get(name)
        if name not in self.wanted or (there is not None and grad.same_place(there)):
            return
        if grad.dtype != sums_dtype(grad.dtype):
            grad, own = self.b.converted(grad, sums_dtype(grad.dtype), f"{name} grad"), True
        if there is None:
            self._found[name] = grad
            self._summed.update([name] if own else [])
            return
        if there.shape != grad.shape:
            grad = self.b.contiguous(grad, f"{name} grad").reshape(*there.shape)
        if name in self._summed:
            self.b.emit("add", a=there, b=grad, out=there)
        else:  # (the first one may be somebody else's too)
            self._found[name] = self.b.sum_of(there, grad, f"{name} grad")
            self._summed.add(name)

    def row(self, names: Sequence[str], shape: Shape, dtype: torch.dtype, order: tuple[int, ...] | None = None) -> View | None:
        """Where a kernel writes a summand of the gradients of these parameters, which it is of all of them; None: none is wanted.

        Args:
            order: the permutation of its dimensions that the parameters have.
        """
        names = tuple(name for name in names if name in self.wanted)
        if not names:
            return None
        size = math.prod(shape)
        rows = self._rows.get((names, shape, dtype))
        if rows is not None and rows.used == rows.block.shape[0]:
            self._sum_rows((names, shape, dtype))
            rows = None
        if rows is None:
            count = 1 if size > _MOST_IN_ROW else min(_MOST_ROWS, self.forward.schedule.timesteps)
            block = self.b.new((count, -(-size // _ALIGNED) * _ALIGNED), dtype, f"{' + '.join(names)} grad of steps")
            rows = self._rows[names, shape, dtype] = _Rows(block, shape, order)
        return rows.row()

    def _sum_rows(self, key: RowKey) -> None:
        rows, (names, shape, dtype) = self._rows.pop(key), key
        for name in names:
            parameter = self.forward.parameters[name]
            turned = shape if rows.order is None else tuple(shape[d] for d in rows.order)
            direct = name not in self._found and turned == parameter.shape and dtype == parameter.dtype
            if rows.used == 1 and not direct:
                one = rows.all()[0]
                self.add(name, one if rows.order is None else one.permute(*rows.order), own=len(names) == 1)
                continue
            total = self.result(name) if direct else self.b.new(turned, dtype, f"{name} grad")
            # (The order the other way round: dimension d of the summands is the one of the total that order puts it at.)
            out = total if rows.order is None else total.permute(*(rows.order.index(d) for d in range(len(shape))))
            self.b.emit("sum_rows", x=rows.all(), out=out)
            self.add(name, total, own=True)

    def add_part(self, name: str, channels: tuple[int, int], grad: View) -> None:
        """One summand of the gradient of some input channels of a weight; nobody else reads it."""
        there = self._parts.setdefault((name, channels), grad)
        if there is not grad and not grad.same_place(there):
            self.b.emit("add", a=there, b=grad, out=there)

    # ---------------------------------------------------------------- sums

    def sum_so_far(self, name: str) -> View | None:
        """To be added to; None: there is none yet, or somebody else may read it."""
        return self._found[name] if name in self._summed else None

    def part_so_far(self, name: str, channels: tuple[int, int]) -> View | None:
        """:meth:`sum_so_far` of some input channels of a weight."""
        return self._parts.get((name, channels))

    def is_there(self, name: str) -> bool:
        """Whether a sum has memory already, to which more can be added."""
        return name in self._summed or any(other == name for other, _ in self._parts)

    def room(self, name: str, shape: Shape) -> View | None:
        """The caller's tensor for a parameter's gradient, while nothing is there."""
        if name in self._found or name not in self.wanted or self.forward.parameters[name].shape != shape:
            return None
        return self.result(name)

    def result(self, name: str) -> View:
        """The caller's tensor for a parameter's gradient."""
        if name not in self._results:
            parameter = self.forward.parameters[name]
            self._results[name] = self.forward.result(f"{name} grad", parameter.shape, parameter.dtype)
        return self._results[name]

    def finish(self) -> dict[str, View]:
        """All sums, as tensors of the caller's, by name."""
        for key in list(self._rows):
            self._sum_rows(key)
        for name in dict.fromkeys(name for name, _ in self._parts):
            self._join(name)
        return {name: self._finished(name) for name in self._found}

    def _join(self, name: str) -> None:
        parts = sorted(((channels, part) for (other, channels), part in self._parts.items() if other == name), key=lambda p: p[0])
        shape, dtype = self.forward.parameters[name].shape, parts[0][1].dtype
        room = self.room(name, shape)
        total = room if room is not None and room.dtype == dtype else self.b.new(shape, dtype, f"{name} grad of all channels")
        ends = [0, *(last for (_, last), _ in parts)]
        one_by_one = [first for (first, _), _ in parts] == ends[:-1] and ends[-1] == shape[1]
        if not one_by_one:
            self.b.emit("fill", out=total, value=0.0)
        for channels, part in parts:
            out = total.narrow(1, *channels)
            if one_by_one:
                self.b.emit("copy", x=part, out=out)
            else:
                self.b.emit("add", a=out, b=part, out=out)
        self.add(name, total, own=True)

    def _finished(self, name: str) -> View:
        grad, result = self._found[name], self.result(name)
        if grad.value is result.value:
            return result
        if name in self.maps_last and not self.b.on_device and result.dtype == grad.dtype:
            channels, height, width = grad.shape
            last = self.maps_last[name].reshape(1, height * width, 1, channels)  # (the same launch, the other way round)
            self.b.channels_last(last, result.reshape(1, 1, channels, height * width))
            return result
        if grad.shape != result.shape:
            grad = self.b.contiguous(grad, f"{name} grad").reshape(*result.shape)
        self.b.emit("copy", x=grad, out=result)
        return result
