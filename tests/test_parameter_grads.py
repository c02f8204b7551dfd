"""Gradients of parameters: sums of rows, of parts of the input channels, and of what kernels add up themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rnndyn_fast.program.bind import tensor_of
from rnndyn_fast.program.builder import Builder
from rnndyn_fast.program.ir import Role, View, map_views
from rnndyn_fast.program.kinds import KINDS
from rnndyn_fast.program.parameter_grads import ParameterGrads


class Pass:
    """A backward pass over parameters of these shapes; summands are written by ``fill``s of NaN-poisoned memory."""

    def __init__(self, timesteps: int = 20, **shapes: tuple[int, ...]) -> None:
        self.b = b = Builder()
        parameters = {name: b.external(Role.PARAMETER, name, shape, torch.float32) for name, shape in shapes.items()}
        forward: Any = SimpleNamespace(
            b=b, wanted=frozenset(shapes), parameters=parameters, schedule=SimpleNamespace(timesteps=timesteps),
            result=lambda name, shape, dtype: b.external(Role.RESULT, name, shape, dtype),
        )  # fmt: skip
        self.grads = ParameterGrads(forward)

    def write(self, out: View | None, value: float) -> None:
        assert out is not None
        self.b.emit("fill", out=out, value=value)

    def results(self) -> dict[str, Tensor]:
        found = self.grads.finish()
        memory: dict[Any, Tensor] = {}

        def tensor(view: View) -> Tensor:
            base = memory.setdefault(view.value, torch.full(view.value.shape, torch.nan))
            return tensor_of(view, base)

        for instr in self.b.instrs:
            KINDS[instr.kind].run(**map_views(instr.operands, tensor))
        assert all(view.value.role is Role.RESULT for view in found.values())
        return {name: tensor(view) for name, view in found.items()}


@pytest.mark.parametrize("steps", [1, 2, 16, 17, 40])
def test_rows_are_summed_for_all_their_parameters(steps: int) -> None:
    p = Pass(bias=(5,), other=(5,))
    for k in range(steps):
        p.write(p.grads.row(["bias", "other", "not wanted"], (5,), torch.float32), float(k))
        p.write(p.grads.row(["other"], (5,), torch.float32), 100.0)
    found = p.results()
    assert torch.equal(found["bias"], torch.full((5,), float(sum(range(steps)))))
    assert torch.equal(found["other"], found["bias"] + 100 * steps)
    assert p.grads.row(["not wanted"], (5,), torch.float32) is None
    assert sum(i.kind == "add" for i in p.b.instrs) <= 2 * steps // 16 + 2


@pytest.mark.parametrize("channels", [3, 3000])
@pytest.mark.parametrize("steps", [1, 5])
def test_rows_in_another_order(channels: int, steps: int) -> None:
    """Kernels [KH, KW, I, C'] whose parameter is [C', I, KH, KW]; large ones, which are not collected, too."""
    p = Pass(weight=(channels, 1, 2, 1))
    for _ in range(steps):
        row = p.grads.row(["weight"], (2, 1, 1, channels), torch.float32, order=(3, 2, 0, 1))
        assert row is not None
        for kh in range(2):
            p.write(row[kh], 1.0 + kh)
    expected = steps * torch.tensor([1.0, 2.0])[None, None, :, None].expand(channels, 1, 2, 1)
    assert torch.equal(p.results()["weight"], expected)


@pytest.mark.parametrize("ranges", [[(0, 2), (2, 4)], [(2, 4), (0, 2)], [(1, 3)], [(0, 3), (1, 4)], [(0, 4)], [(0, 2), (0, 4)]])
def test_parts_of_the_channels(ranges: list[tuple[int, int]]) -> None:
    p, expected = Pass(weight=(3, 4)), torch.zeros(3, 4)
    for k, (first, last) in enumerate(ranges):
        for value in (1.0 + k, 10.0):
            part = p.b.new((3, last - first), torch.float32, "part")
            p.write(part, value)
            p.grads.add_part("weight", (first, last), part)
            expected[:, first:last] += value
    assert p.grads.is_there("weight")
    assert torch.equal(p.results()["weight"], expected)
