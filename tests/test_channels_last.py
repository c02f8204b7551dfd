"""``channels_last``: exact, at every shape and for each instruction set."""

from __future__ import annotations

import pytest
import torch

from rnndyn_fast.ops.channels_last import channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 16, 4, 4), (3, 17, 5, 7), (2, 64, 14, 14), (1, 33, 1, 19), (2, 3, 32, 32), (1, 8, 3, 3)], ids=str
)
def test_maps_are_turned(shape: tuple[int, int, int, int], dtype: torch.dtype, isa: str) -> None:
    n, c, h, w = shape
    x = torch.randn(shape, dtype=dtype)
    room = torch.full((n * h * w * c + 2,), float("nan"), dtype=dtype)
    out = room[1:-1].view(n, h, w, c)
    assert channels_last(x, out) is out
    assert torch.equal(out, x.permute(0, 2, 3, 1))
    assert room[[0, -1]].isnan().all(), "it wrote beyond the map"


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(2, 16, 5, 6)[:, ::2],
        torch.randn(2, 8, 5, 6).bfloat16(),
    ],
    ids=["channels last", "strided", "bfloat16"],
)
def test_what_the_kernel_does_not_take_is_turned_too(x: torch.Tensor) -> None:
    out = torch.empty(2, 5, 6, 8, dtype=x.dtype)
    assert torch.equal(channels_last(x, out), x.permute(0, 2, 3, 1))
