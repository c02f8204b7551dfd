"""A rollout as a program: values, instructions that read and write views of them, and how both are printed.

A :class:`Value` is a buffer of known shape and dtype. A :class:`View` is a part of one, as a kernel sees it. An :class:`Instr` names a kind
of the table of kinds (:mod:`rnndyn_fast.program.kinds`) and gives its operands: views where the table says "reads" or "writes", numbers,
enums and plain data elsewhere. Nothing here holds or touches a tensor.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

Shape = tuple[int, ...]


class Role(enum.Enum):
    """Who provides a value's memory.

    ARENA: the program, which places it. INPUT, PARAMETER: the caller. PACKED: a packed weight that outlives the rollout. RESULT: a new
    tensor of the caller's. GRADIENT: the gradient of a result, from the caller.
    """

    ARENA = "arena"
    INPUT = "input"
    PARAMETER = "parameter"
    PACKED = "packed"
    RESULT = "result"
    GRADIENT = "gradient"


@dataclass(frozen=True, eq=False)
class Value:
    """A buffer. ``strides`` are those of a tensor that the caller provides; None: contiguous. ``source``: which one it is, of its role."""

    number: int
    name: str
    shape: Shape
    dtype: torch.dtype
    role: Role = Role.ARENA
    strides: Shape | None = None
    source: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous buffer."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"%{self.number}"


@lru_cache(maxsize=4096)
def contiguous_strides(shape: Shape) -> Shape:
    """Of a contiguous tensor, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class View:
    """A strided part of a value; ``offset`` in elements."""

    value: Value
    shape: Shape
    strides: Shape
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.value.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """As ``torch.Tensor.is_contiguous``."""
        wanted = contiguous_strides(self.shape)
        return self.strides == wanted or all(n == 1 or s == w for n, s, w in zip(self.shape, self.strides, wanted, strict=True))

    def __getitem__(self, index: int) -> View:
        """One entry of the first dimension."""
        return View(self.value, self.shape[1:], self.strides[1:], self.offset + index * self.strides[0])

    def rows(self, first: int, last: int) -> View:
        """Entries first .. last - 1 of the first dimension."""
        return View(self.value, (last - first, *self.shape[1:]), self.strides, self.offset + first * self.strides[0])

    def narrow(self, dim: int, first: int, last: int) -> View:
        """Entries first .. last - 1 of a dimension."""
        shape = (*self.shape[:dim], last - first, *self.shape[dim + 1 :])
        return View(self.value, shape, self.strides, self.offset + first * self.strides[dim])

    def permute(self, *dims: int) -> View:
        """As ``torch.Tensor.permute``."""
        return View(self.value, tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims), self.offset)

    def reshape(self, *shape: int) -> View:
        """Of a contiguous view."""
        assert self.is_contiguous, self
        assert math.prod(shape) == self.numel, (self, shape)
        return View(self.value, shape, contiguous_strides(shape), self.offset)

    def parts(self, count: int) -> list[View]:
        """So many equal parts of the first dimension."""
        size = self.shape[0] // count
        return [self.rows(k * size, (k + 1) * size) for k in range(count)]

    def same_place(self, other: View) -> bool:
        """Whether two views begin at one place of one value."""
        return self.value is other.value and self.offset == other.offset

    def __str__(self) -> str:
        at = "" if self.offset == 0 and self.numel == math.prod(self.value.shape) else f"+{self.offset}"
        return f"{self.value}{at}[{'x'.join(map(str, self.shape))}]"


def whole(value: Value) -> View:
    """All of a value."""
    return View(value, value.shape, value.strides or contiguous_strides(value.shape))


def views_in(operand: Any) -> list[View]:
    """The views among operands, however they are nested."""
    if isinstance(operand, View):
        return [operand]
    if isinstance(operand, dict):
        operand = operand.values()
    elif not isinstance(operand, (list, tuple)):
        return []
    found: list[View] = []
    for part in operand:
        if isinstance(part, View):
            found.append(part)
        elif part is not None:
            found += views_in(part)
    return found


def map_views(operand: Any, function: Callable[[View], Any]) -> Any:
    """The operand with every view replaced."""
    if isinstance(operand, View):
        return function(operand)
    if isinstance(operand, dict):
        return {name: map_views(part, function) for name, part in operand.items()}
    if isinstance(operand, tuple) and hasattr(operand, "_fields"):
        return type(operand)(*(map_views(part, function) for part in operand))
    if isinstance(operand, list | tuple):
        return type(operand)(map_views(part, function) for part in operand)
    return operand


@dataclass(frozen=True, eq=False)
class Instr:
    """One instruction: a kind of the launch table, and its operands by name."""

    kind: str
    operands: dict[str, Any]
    reads: tuple[View, ...]
    writes: tuple[View, ...]

    def __str__(self) -> str:
        views = {id(v) for v in (*self.reads, *self.writes)}
        written = ", ".join(map(str, self.writes))
        read = ", ".join(map(str, self.reads))
        rest = [f"{k}={_short(v)}" for k, v in self.operands.items() if not any(id(x) in views for x in views_in(v)) and v is not None]
        rest = [text for text in rest if not text.endswith(("=[]", "=()", "={}", "=False"))]
        return f"{written} = {self.kind}({read}{'; ' if rest else ''}{', '.join(rest)})"


def _short(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__name__", type(value).__name__)
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, eq=False)
class Program:
    """Instructions in order, of which those from ``split`` on are the backward pass.

    ``offsets``: the byte of the arena at which each of its values begins, by number; a value that is left out is a tensor of the caller's.
    ``nbytes``: of the arena.
    """

    instrs: tuple[Instr, ...]
    offsets: dict[int, int]
    nbytes: int
    split: int

    def part(self, *, backward: bool) -> tuple[Instr, ...]:
        """One of the passes."""
        return self.instrs[self.split :] if backward else self.instrs[: self.split]

    def __str__(self) -> str:
        lines = []
        for k, instr in enumerate(self.instrs):
            if k == self.split:
                lines.append("backward:")
            lines.append(f"{k:>5}  {instr}")
        return "\n".join(lines)


def instr_lives(instrs: Sequence[Instr]) -> dict[Value, tuple[int, int]]:
    """The first and the last instruction that touches each value of the arena."""
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for k, instr in enumerate(instrs):
        for view in (*instr.reads, *instr.writes):
            value = view.value
            if value.role is Role.ARENA:
                first.setdefault(value, k)
                last[value] = k
    return {value: (k, last[value]) for value, k in first.items()}
