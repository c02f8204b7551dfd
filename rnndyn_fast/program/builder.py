"""The list of instructions while it is written: values are numbered, operands sorted into reads and writes by the launch table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rnndyn_fast.ops import core
from rnndyn_fast.program.ir import Instr, Role, Shape, Value, View, contiguous_strides, views_in, whole
from rnndyn_fast.program.kinds import KINDS


class Builder:
    """Of one program. ``on_device``: for a CUDA device."""

    def __init__(self, on_device: bool = False) -> None:
        self.instrs: list[Instr] = []
        self.values: list[Value] = []
        self.on_device = on_device

    def new(self, shape: Sequence[int], dtype: torch.dtype, name: str) -> View:
        """A new value of the arena."""
        value = Value(len(self.values), name, tuple(shape), dtype)
        self.values.append(value)
        return View(value, value.shape, contiguous_strides(value.shape))

    def external(self, role: Role, name: str, shape: Shape, dtype: torch.dtype, strides: Shape | None = None, source: Any = None) -> View:
        """A value that the caller provides."""
        value = Value(len(self.values), name, tuple(shape), dtype, role, strides, name if source is None else source)
        self.values.append(value)
        return whole(value)

    def emit(self, kind: str, **operands: Any) -> None:
        """One instruction."""
        row = KINDS[kind]
        reads: list[View] = []
        writes: list[View] = []
        for name, operand in operands.items():
            read, written = name in row.reads, name in row.writes
            if not (read or written):
                assert not isinstance(operand, View), (kind, name)
            elif isinstance(operand, View):
                if read:
                    reads.append(operand)
                if written:
                    writes.append(operand)
            elif operand is not None:
                views = views_in(operand)
                reads += views if read else []
                writes += views if written else []
        self.instrs.append(Instr(kind, operands, tuple(reads), tuple(writes)))

    # ---------------------------------------------------------------- views of maps

    def stacked(self, maps: Sequence[View], name: str = "stacked") -> View:
        """Maps [N, ...] one after another as one, [len(maps) * N, ...]: a view where they are neighbours in memory, else a copy."""
        first = maps[0]
        if len(maps) == 1:
            return first
        neighbours = all(m.is_contiguous and m.value is first.value for m in maps)
        if neighbours and all(m.offset == first.offset + k * first.numel for k, m in enumerate(maps)):
            return View(first.value, (len(maps) * first.shape[0], *first.shape[1:]), contiguous_strides(first.shape), first.offset)
        out = self.new((sum(m.shape[0] for m in maps), *first.shape[1:]), first.dtype, name)
        self.emit("cat", parts=list(maps), out=out)
        return out

    def contiguous(self, view: View, name: str = "contiguous") -> View:
        """The view, or a contiguous copy."""
        return view if view.is_contiguous else self.converted(view, view.dtype, name)

    def converted(self, view: View, dtype: torch.dtype, name: str) -> View:
        """A contiguous copy in another dtype."""
        out = self.new(view.shape, dtype, name)
        self.emit("copy", x=view, out=out)
        return out

    def channels_last(self, x: View, out: View) -> View:
        """x [N, C, H, W] as out [N, H, W, C]."""
        native = core.unavailable is None and not self.on_device and x.is_contiguous and x.dtype == out.dtype
        if native and x.dtype in (torch.float32, torch.float64):
            self.emit("channels_last", x=x, out=out)
        else:
            self.emit("copy", x=x.permute(0, 2, 3, 1), out=out)
        return out

    def maps_last(self, grad: View, name: str) -> View:
        """A map [N, H, W, C] of any strides, contiguous."""
        if grad.is_contiguous:
            return grad
        return self.channels_last(grad.permute(0, 3, 1, 2), self.new(grad.shape, grad.dtype, name))

    def at_most(self, terms: Sequence[View], limit: int) -> list[View]:
        """The terms, with those past what a kernel takes summed into one."""
        if len(terms) <= limit:
            return list(terms)
        out = self.new(terms[0].shape, terms[0].dtype, "rest of a sum")
        self.emit("total", terms=list(terms[limit - 1 :]), out=out)
        return [*terms[: limit - 1], out]

    def sum_of(self, a: View, b: View, name: str) -> View:
        """A new value a + b."""
        out = self.new(a.shape, a.dtype, name)
        self.emit("add", a=a, b=b, out=out)
        return out

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, name: str = "zeros") -> View:
        """A new value of zeros."""
        out = self.new(shape, dtype, name)
        self.emit("fill", out=out, value=0.0)
        return out
