"""``depthwise_conv``: a convolution whose groups have few channels, one of a depthwise one: float32 and float64 on the CPU. On CUDA
devices only depthwise ones, in float32, float16 and bfloat16; the bias and the weight's gradient are float32 there.

Equations, precision and traffic: ``csrc/cpu/depthwise_conv_kernel.h``, ``csrc/cuda/depthwise_conv.cu``. Maps are channels-last and
contiguous, [N, H, W, C]; kernels [KH, KW, I, C'], with I channels of the source in a group. Its reference is PyTorch's convolution with
groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.ops.buffers import empty, sums_dtype

MAX_KERNEL = 16  # kMaxDepthwiseKernel of depthwise_conv.h; the core checks it
MAX_GROUP = 16  # channels of a group, on either side, beyond which matrix products are the better way


def pack_depthwise(
    weight: Tensor,  # [C', I, KH, KW]
) -> Tensor:
    """A parameter as the kernels take it: [KH, KW, I, C']."""
    return weight.permute(2, 3, 1, 0).contiguous()


def unpack_depthwise(
    packed: Tensor,  # [KH, KW, I, C']
) -> Tensor:
    """The inverse of :func:`pack_depthwise`."""
    return packed.permute(3, 2, 0, 1).contiguous()


def depthwise_conv(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [KH, KW, I, C']
    bias: Tensor | None,  # [C']
    stride: int,
    before: tuple[int, int],  # zeros above and left
    size: tuple[int, int],  # height and width of the result: what lies below and right of the map is zero
) -> Tensor:
    """The convolution: [N, *size, C']."""
    out = empty((x.shape[0], *size, weight.shape[3]), x.dtype)
    launches.depthwise_conv(x=x, weight=weight, bias=bias, out=out, step=stride, before=before)
    return out


def pack_pointwise(
    weight: Tensor,  # [C', C, 1, 1]
) -> Tensor:
    """A 1 x 1 convolution's parameter as :func:`separable_conv` takes it: [C, C' rounded up to a multiple of 32], zero beyond C'."""
    outputs, inputs = weight.shape[:2]
    return torch.cat([weight.flatten(1).t(), weight.new_zeros((inputs, -outputs % 32))], 1).contiguous()


def separable_conv(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [KH, KW, I, M]
    bias: Tensor | None,  # [M]
    pointwise: Tensor,  # [M, P] of pack_pointwise
    channels: int,  # C', of the result
    stride: int,
    before: tuple[int, int],
    size: tuple[int, int],
    out: Tensor | None = None,  # [N, *size, C']
) -> Tensor:
    """:func:`depthwise_conv` and a 1 x 1 convolution without bias, float32 on the CPU, without a map in between: [N, *size, C']."""
    if out is None:
        out = empty((x.shape[0], *size, channels), x.dtype)
    launches.separable_conv(x=x, weight=weight, bias=bias, pointwise=pointwise, out=out, step=stride, before=before)
    return out


def depthwise_data_grad(
    grad: Tensor,  # [N, H', W', C']
    weight: Tensor,  # [KH, KW, I, C']
    stride: int,
    before: tuple[int, int],
    shape: tuple[int, int, int],  # height, width and channels of the source
) -> Tensor:
    """Gradient of the source: [N, *shape]. A convolution of ``grad``, dilated by the stride, with the turned kernel."""
    kh, kw, inputs, channels = weight.shape
    groups = shape[2] // inputs
    out = empty((grad.shape[0], *shape), grad.dtype)
    turned = (kh - 1 - before[0], kw - 1 - before[1])
    back = weight.flip(0, 1).view(kh, kw, inputs, groups, channels // groups).permute(0, 1, 4, 3, 2)
    back = back.reshape(kh, kw, channels // groups, shape[2]).contiguous()
    launches.depthwise_conv(x=grad, weight=back, out=out, step=1, dilation=stride, before=turned)
    return out


def depthwise_weight_grad(
    x: Tensor,  # [N, H, W, C]
    grad: Tensor,  # [N, H', W', C']
    kernel: tuple[int, int, int],  # height, width and I
    stride: int,
    before: tuple[int, int],
) -> Tensor:
    """Gradient of the weight over all samples: [KH, KW, I, C']."""
    out = torch.empty((*kernel, grad.shape[3]), dtype=sums_dtype(x.dtype), device=x.device)
    launches.depthwise_weight_grad(x=x, grad=grad, grad_weight=out, step=stride, before=before)
    return out
