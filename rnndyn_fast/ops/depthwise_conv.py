"""``depthwise_conv``: a convolution of every channel with a kernel of its own: float32 and float64 on the CPU; float32, float16
and bfloat16 on CUDA devices, where the bias and the weight's gradient are float32.

Equations, precision and traffic: ``csrc/cpu/depthwise_conv_kernel.h``, ``csrc/cuda/depthwise_conv.cu``. Maps are channels-last and
contiguous, [N, H, W, C]; kernels [KH, KW, C]. Its reference is PyTorch's convolution with as many groups as channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch_steps
from rnndyn_fast.ops.buffers import empty, sums_dtype

MAX_KERNEL = 16  # kMaxDepthwiseKernel of depthwise_conv.h; the core checks it


def pack_depthwise(
    weight: Tensor,  # [C, 1, KH, KW]
) -> Tensor:
    """A parameter as the kernels take it: [KH, KW, C]."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def unpack_depthwise(
    packed: Tensor,  # [KH, KW, C]
) -> Tensor:
    """The inverse of :func:`pack_depthwise`."""
    return packed.permute(2, 0, 1).unsqueeze(1).contiguous()


def depthwise_conv(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [KH, KW, C]
    bias: Tensor | None,  # [C]
    stride: int,
    before: tuple[int, int],  # zeros above and left
    size: tuple[int, int],  # height and width of the result: what lies below and right of the map is zero
) -> Tensor:
    """The convolution: [N, *size, C]."""
    out = empty((x.shape[0], *size, x.shape[3]), x.dtype)
    _launch_steps.depthwise_conv(x, weight, bias, out, stride, 1, before)
    return out


def depthwise_data_grad(
    grad: Tensor,  # [N, H', W', C]
    weight: Tensor,  # [KH, KW, C]
    stride: int,
    before: tuple[int, int],
    size: tuple[int, int],  # of the source
) -> Tensor:
    """Gradient of the source: [N, *size, C]. A convolution of ``grad``, dilated by the stride, with the turned kernel."""
    out = empty((grad.shape[0], *size, grad.shape[3]), grad.dtype)
    turned = (weight.shape[0] - 1 - before[0], weight.shape[1] - 1 - before[1])
    _launch_steps.depthwise_conv(grad, weight.flip(0, 1), None, out, 1, stride, turned)
    return out


def depthwise_weight_grad(
    x: Tensor,  # [N, H, W, C]
    grad: Tensor,  # [N, H', W', C]
    kernel: tuple[int, int],
    stride: int,
    before: tuple[int, int],
) -> Tensor:
    """Gradient of the weight over all samples: [KH, KW, C]."""
    out = torch.empty((*kernel, x.shape[3]), dtype=sums_dtype(x.dtype), device=x.device)
    _launch_steps.depthwise_weight_grad(x, grad, out, stride, before)
    return out
