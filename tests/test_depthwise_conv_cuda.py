"""The CUDA depthwise_conv, in the SIMT harness (or on a device), against PyTorch's grouped convolution in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_rollouts import DEVICE, send_to_kernels
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.ops.depthwise_conv import (
    depthwise_conv,
    depthwise_data_grad,
    depthwise_weight_grad,
    pack_depthwise,
    unpack_depthwise,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, H, W, C, kernel, stride, zeros above, left, below, right: vectors of four channels and single ones, more than a block takes; kernels
# that a thread keeps in registers and others; outputs that do not divide by four; several parts of the weight's gradient.
CASES = [
    (1, 1, 1, 1, (3, 3), 1, (1, 1, 1, 1)),
    (2, 7, 9, 5, (3, 3), 1, (1, 1, 1, 1)),
    (2, 7, 10, 12, (3, 3), 1, (1, 1, 1, 1)),
    (1, 4, 5, 132, (3, 3), 1, (1, 1, 1, 1)),
    (3, 5, 4, 8, (5, 5), 1, (2, 2, 2, 2)),
    (1, 9, 8, 16, (7, 7), 1, (3, 3, 3, 3)),
    (2, 8, 11, 16, (2, 2), 1, (0, 0, 1, 1)),
    (2, 9, 8, 20, (3, 3), 2, (1, 1, 1, 1)),
    (1, 14, 13, 3, (7, 7), 2, (2, 2, 3, 3)),
    (1, 4, 6, 20, (4, 3), 3, (1, 0, 2, 2)),
    (4, 40, 3, 128, (3, 3), 1, (0, 2, 1, 0)),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def kernels(simt: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if DEVICE is None:
        send_to_kernels(monkeypatch, *DTYPES)
    return simt


def results(case: tuple, held: torch.dtype, dtype: torch.dtype, native: bool) -> dict[str, Tensor]:
    """The convolution, of values that a dtype holds exactly, and the gradients of its source and weight."""
    n, h, w, c, kernel, stride, (top, left, bottom, right) = case
    generator = torch.Generator().manual_seed(6)

    def draw(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(held)
        return values.to(torch.get_default_device(), dtype)

    x, weight, bias = draw(n, h, w, c), draw(c, 1, *kernel), draw(c)
    size = ((h + top + bottom - kernel[0]) // stride + 1, (w + left + right - kernel[1]) // stride + 1)
    grad = draw(n, *size, c)
    if native:
        packed = pack_depthwise(weight)
        y = depthwise_conv(x, packed, bias.float(), stride, (top, left), size)
        grad_x = depthwise_data_grad(grad, packed, stride, (top, left), (h, w, c))
        grad_weight = unpack_depthwise(depthwise_weight_grad(x, grad, (*kernel, 1), stride, (top, left)))
        assert grad_weight.dtype == torch.float32
        return {"y": y, "grad_x": grad_x, "grad_weight": grad_weight}
    x.requires_grad_(True)
    weight.requires_grad_(True)
    padded = functional.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    y = functional.conv2d(padded, weight, bias, stride, groups=c).permute(0, 2, 3, 1)
    grads = torch.autograd.grad((y * grad).sum(), (x, weight))
    return {"y": y.detach(), "grad_x": grads[0], "grad_weight": grads[1]}


@by_case
@by_dtype
def test_is_as_good_as_plain_pytorch(case: tuple, dtype: torch.dtype, kernels: Any) -> None:
    """Error in norm against float64: at most twice that of PyTorch, plus a few roundings."""
    truth = results(case, dtype, torch.float64, False)
    ours, plain = results(case, dtype, dtype, True), results(case, dtype, dtype, False)
    for key, expected in truth.items():
        assert not ours[key].isnan().any(), f"{key}: NaN (or something left unwritten)"
        error, reference = (float((r[key].double() - expected).norm() / (expected.norm() + 1e-3)) for r in (ours, plain))
        assert error <= 2 * reference + 4 * torch.finfo(dtype).eps, (key, error, reference)


def test_the_order_of_threads_changes_no_bit(kernels: Any) -> None:
    found = []
    for seed, order in enumerate((kernels.Order.FORWARD, kernels.Order.REVERSED, kernels.Order.RANDOM)):
        kernels.set_order(order, seed)
        found.append(results(CASES[2], torch.float16, torch.float16, True))
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in other)


def test_nan_stays_where_it_is(kernels: Any) -> None:
    x = torch.zeros(1, 9, 9, 20)
    x[0, 4, 4, 3] = torch.nan
    y = depthwise_conv(x, torch.ones(3, 3, 1, 20), None, 1, (1, 1), (9, 9))
    assert y.isnan().sum() == 9
    assert y[0, 3:6, 3:6, 3].isnan().all()


def test_what_it_cannot_do_is_refused(kernels: Any) -> None:
    with pytest.raises(ValueError, match="kernels of 1 to 16 rows and columns"):
        depthwise_conv(torch.zeros(1, 20, 20, 2), torch.zeros(17, 17, 1, 2), None, 1, (8, 8), (20, 20))
    with pytest.raises(ValueError, match="expected a channel per group on devices"):
        depthwise_conv(torch.zeros(1, 4, 4, 2), torch.zeros(3, 3, 1, 4), None, 1, (1, 1), (4, 4))
    with pytest.raises(ValueError, match=r"weight: expected .* got \[3, 3, 1, 2\] of torch.float32 on meta"):
        depthwise_conv(torch.zeros(1, 4, 4, 2), torch.zeros(3, 3, 1, 2, device="meta"), None, 1, (1, 1), (4, 4))
    with pytest.raises(ValueError, match=r"bias: expected a contiguous tensor \[2\] of torch.float32"):
        depthwise_conv(torch.zeros(1, 4, 4, 2).half(), torch.zeros(3, 3, 1, 2).half(), torch.zeros(2).half(), 1, (1, 1), (4, 4))
