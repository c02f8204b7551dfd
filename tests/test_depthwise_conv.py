"""``depthwise_conv`` against PyTorch's grouped convolution: values, gradients, accuracy, instruction sets, threads, odd paddings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops.depthwise_conv import (
    depthwise_conv,
    depthwise_data_grad,
    depthwise_weight_grad,
    pack_depthwise,
    pack_pointwise,
    separable_conv,
    unpack_depthwise,
)

# N, H, W, C (or groups, channels of one in the source, in the result), kernel, stride, zeros above, left, below, right
CASES = [
    (2, 7, 9, 5, (3, 3), 1, (1, 1, 1, 1)),
    (1, 28, 28, 64, (7, 7), 1, (3, 3, 3, 3)),
    (3, 5, 4, 33, (5, 5), 1, (2, 2, 2, 2)),
    (2, 8, 11, 16, (2, 2), 1, (0, 0, 1, 1)),
    (2, 9, 8, 17, (3, 3), 2, (1, 1, 1, 1)),
    (1, 14, 13, 3, (7, 7), 2, (2, 2, 3, 3)),
    (1, 4, 6, 20, (4, 3), 3, (1, 0, 2, 2)),
    (1, 1, 1, 1, (3, 3), 1, (1, 1, 1, 1)),
    (1, 150, 40, 8, (5, 5), 1, (2, 2, 2, 2)),
    (2, 6, 5, (11, 9, 4), (5, 5), 1, (2, 2, 2, 2)),
    (1, 7, 9, (8, 4, 9), (3, 3), 1, (1, 1, 1, 1)),
    (2, 5, 6, (13, 2, 3), (3, 2), 2, (1, 0, 1, 1)),
    (1, 4, 3, (3, 16, 1), (3, 3), 1, (1, 1, 1, 1)),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


def results(case: tuple, dtype: torch.dtype, native: bool) -> dict[str, Tensor]:
    """The convolution and the gradients of its source and weight."""
    n, h, w, c, kernel, stride, (top, left, bottom, right) = case
    groups, ins, outs = c if isinstance(c, tuple) else (c, 1, 1)
    c = groups * outs
    generator = torch.Generator().manual_seed(6)
    shapes = ((n, h, w, groups * ins), (c, ins, *kernel), (c,))
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    size = ((h + top + bottom - kernel[0]) // stride + 1, (w + left + right - kernel[1]) // stride + 1)
    grad = torch.randn((n, *size, c), generator=generator, dtype=torch.float64).to(dtype)
    if native:
        packed = pack_depthwise(weight)
        y = depthwise_conv(x, packed, bias, stride, (top, left), size)
        grad_x = depthwise_data_grad(grad, packed, stride, (top, left), (h, w, groups * ins))
        grad_weight = unpack_depthwise(depthwise_weight_grad(x, grad, (*kernel, ins), stride, (top, left)))
        return {"y": y, "grad_x": grad_x, "grad_weight": grad_weight}
    x.requires_grad_(True)
    weight.requires_grad_(True)
    padded = functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    y = functional.conv2d(padded, weight, bias, stride, groups=groups).permute(0, 2, 3, 1)
    grads = torch.autograd.grad((y * grad).sum(), (x, weight))
    return {"y": y.detach(), "grad_x": grads[0], "grad_weight": grads[1]}


@by_case
def test_equals_pytorch_in_float64(case: tuple, isa: str) -> None:
    ours, theirs = results(case, torch.float64, True), results(case, torch.float64, False)
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@by_case
def test_accuracy_in_float32(case: tuple, isa: str) -> None:
    """Error in norm against float64: at most twice that of PyTorch, plus a few roundings."""
    truth = results(case, torch.float64, False)
    ours, theirs = results(case, torch.float32, True), results(case, torch.float32, False)
    for key, expected in truth.items():
        error, reference = ((r[key].double() - expected).norm() / expected.norm() for r in (ours, theirs))
        assert error <= 2 * reference + 2e-7, (key, error.item(), reference.item())


def test_threads_change_no_bit() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(CASES[2], torch.float32, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


def test_packing_is_undone() -> None:
    weight = torch.randn(6, 2, 3, 5)
    assert torch.equal(unpack_depthwise(pack_depthwise(weight)), weight)


def test_nan_stays_where_it_is() -> None:
    x = torch.zeros(1, 9, 9, 20)
    x[0, 4, 4, 3] = torch.nan
    y = depthwise_conv(x, torch.ones(3, 3, 1, 20), None, 1, (1, 1), (9, 9))
    assert y.isnan().sum() == 9
    assert y[0, 3:6, 3:6, 3].isnan().all()


def test_the_core_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="kernels of 1 to 16 rows and columns"):
        depthwise_conv(torch.zeros(1, 20, 20, 2), torch.zeros(17, 17, 1, 2), None, 1, (8, 8), (20, 20))
    with pytest.raises(ValueError, match="weight: expected whole groups of 2 of 3 channels, and of the result's 4"):
        depthwise_conv(torch.zeros(1, 4, 4, 3), torch.zeros(3, 3, 2, 4), None, 1, (1, 1), (4, 4))
    with pytest.raises(ValueError, match=r"weight: expected a contiguous CPU tensor \[3, 3, 1, 4\]"):
        depthwise_conv(torch.zeros(1, 4, 4, 4), torch.zeros(3, 3, 1, 4, dtype=torch.float64), None, 1, (1, 1), (4, 4))


@by_case
@pytest.mark.parametrize("channels", [1, 16, 33, 64])
def test_separable_in_one_kernel(case: tuple, channels: int, isa: str) -> None:
    """Against the two convolutions in float64; nothing beyond the result is written, and threads change no bit."""
    n, h, w, c, kernel, stride, (top, left, bottom, right) = case
    groups, ins, outs = c if isinstance(c, tuple) else (c, 1, 1)
    generator = torch.Generator().manual_seed(7)
    middle = groups * outs
    shapes = ((n, h, w, groups * ins), (middle, ins, *kernel), (middle,), (channels, middle, 1, 1))
    x, weight, bias, pointwise = (torch.randn(s, generator=generator) for s in shapes)
    size = ((h + top + bottom - kernel[0]) // stride + 1, (w + left + right - kernel[1]) // stride + 1)
    padded = functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom)).double()
    between = functional.conv2d(padded, weight.double(), bias.double(), stride, groups=groups)
    expected = functional.conv2d(between, pointwise.double()).permute(0, 2, 3, 1)
    numbers, threads, found = n * size[0] * size[1] * channels, torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            room = torch.full((numbers + 2,), torch.nan)
            out = room[1:-1].view(n, *size, channels)
            separable_conv(x, pack_depthwise(weight), bias, pack_pointwise(pointwise), channels, stride, (top, left), size, out)
            assert room[[0, -1]].isnan().all(), "it wrote beyond the map"
            found.append(out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0] - expected).norm() <= 1e-6 * expected.norm() + 1e-6
