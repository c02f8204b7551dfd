"""A linear map by itself: the instructions that a rollout would have of it, each run as soon as it is written.

For measurements and tests of engines: operands are tensors, weights are packed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import first_element
from rnndyn_fast.ops.amx_conv import reaches_all
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.engines import EngineChoice, Geometry
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.program.bind import tensor_of
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Role, Shape, Value, View, map_views
from rnndyn_fast.program.kinds import KINDS
from rnndyn_fast.program.linear import Dense, Into, convolve_sum

_tensors: WeakKeyDictionary[Value, Tensor] = WeakKeyDictionary()  # of every value that is still known to a map


def _tensor(view: View) -> Tensor:
    if view.value not in _tensors:
        _tensors[view.value] = empty((view.value.nbytes // view.dtype.itemsize,), view.dtype)
    return tensor_of(view, _tensors[view.value])


@dataclass
class _WeightGrad:
    """The gradient of the only weight. ``there``: to which it is added."""

    there: View | None

    def sum_so_far(self, name: str) -> View | None:
        return self.there

    def part_so_far(self, name: str, channels: tuple[int, int]) -> View | None:
        return self.there

    def room(self, name: str, shape: Shape) -> View | None:
        return None

    def add_part(self, name: str, channels: tuple[int, int], grad: View) -> None:
        raise NotImplementedError("a map of all channels")

    def row(self, names: Sequence[str], shape: Shape, dtype: torch.dtype, order: tuple[int, ...] | None = None) -> View | None:
        raise NotImplementedError("a dense map")


@dataclass
class _OneWeight:
    """What :class:`Dense` asks of the maps of a rollout."""

    b: Builder
    parameters: Mapping[str, View] = field(default_factory=dict)

    def parameter(self, name: str) -> View:
        return self.parameters[name]

    def vendor_layout(self, weight: View, name: str) -> View:
        o, i, kh, kw = weight.shape
        out = self.b.new((o, kh, kw, i), weight.dtype, name).permute(0, 3, 1, 2)
        self.b.emit("copy", x=weight, out=out)
        return out


class OneMap:
    """A linear map of maps [M, H, W, C].

    Args:
        weight: contiguous; [C', C, K, K], transposed [C, C', K, K], or [C', C].
        choice: the engine.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, choice: EngineChoice) -> None:
        self.geometry, self.weight, self.choice = geometry, weight, choice
        self.b = Builder(weight.is_cuda)
        maps: Any = _OneWeight(self.b, {"weight": self.given(weight)})
        self.dense = Dense(maps, "weight", geometry, choice)

    def given(self, tensor: Tensor) -> View:
        """A tensor as an operand."""
        view = self.b.external(Role.INPUT, "tensor", tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))
        _tensors[view.value] = tensor
        return view

    def run(self) -> None:
        """What was written since the last time."""
        instrs, self.b.instrs = self.b.instrs, []
        self.b.values.clear()
        for instr in instrs:
            KINDS[instr.kind].run(**map_views(instr.operands, _tensor))

    def pack(self, *, backward: bool) -> list[Tensor]:
        """The weight as our engines take it, packed anew."""
        self.dense.drop_packed()
        views, _ = self.dense.packed(backward=backward)
        self.run()
        return [_tensor(view) for view in views]

    def forward(
        self,
        x: Tensor,  # [M, H, W, C]
        out: Tensor | None = None,  # [M, H', W', C']
    ) -> Tensor:
        """The map's value, [M, H', W', C'], without bias."""
        return sum_of_maps([self], [x], out)

    def backward(
        self,
        x: Tensor,  # [M, H, W, C]
        grad: Tensor,  # [M, H', W', C']
        *,
        need_x: bool = False,
        need_weight: bool = False,
        into: Tensor | None = None,  # [M, H, W, C]
        weight_into: Tensor | None = None,  # as the weight, contiguous
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the weight, where they are needed. ``into``, ``weight_into``: to which they are added."""
        there = None if weight_into is None else self.given(weight_into)
        to = Into(_WeightGrad(there), None if into is None else self.given(into))
        grad_x, found = self.dense.backward(self.given(x), self.given(grad), to, need_x=need_x, need_weight=need_weight)
        self.run()
        results = []
        for view, given in ((grad_x, into), (found[0][1] if found else None, weight_into)):
            at = None if view is None else _tensor(view)
            results.append(given if at is not None and given is not None and first_element(at) == first_element(given) else at)
        return results[0], results[1]


def sum_of_maps(
    maps: Sequence[OneMap],
    xs: Sequence[Tensor],  # each [M, H, W, C]
    out: Tensor | None = None,  # [M, H', W', C']
    end: Epilogue | None = None,
    *,
    accumulate: bool = False,
) -> Tensor:
    """The sum of several maps in one call, [M, H', W', C'].

    Args:
        end: what becomes of it as it leaves.
        accumulate: add it to ``out``.
    """
    first = maps[0]
    to = None if out is None else first.given(out)
    if end is None and not accumulate:
        to = convolve_sum([m.dense for m in maps], [first.given(x) for x in xs], to)
    else:
        assert to is not None
        packed = [m.dense.packed(backward=False) for m in maps]
        if not accumulate and first.dense.choice.map is not None and not reaches_all(first.dense.choice.map, backward=False):
            first.b.emit("fill", out=to, value=0.0)
        epilogue = {} if end is None else {"ends": True, **{name: _given(first, value) for name, value in vars(end).items()}}
        first.b.emit(
            "conv", xs=[first.given(x) for x in xs], packed=[views for views, _ in packed], out=to, forms=[form for _, form in packed],
            accumulate=accumulate, **epilogue,
        )  # fmt: skip
    for m in (*maps[1:], first):  # (weights of the others are packed first)
        m.run()
    return _tensor(to)


def _given(first: OneMap, operand: Any) -> Any:
    if isinstance(operand, Tensor):
        return first.given(operand)
    if isinstance(operand, list | tuple):
        return [_given(first, part) for part in operand]
    return operand
