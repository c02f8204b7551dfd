"""The fused convolution on CUDA devices (``recurrent_conv``, docs/kernels.md) as an engine of rollouts.

float16 and bfloat16 maps, float32 sums on tensor cores. One launch computes and sums any number of terms, adds what is there already and
the bias, multiplies where the interaction is multiplicative, and leaves LayerNorm's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnndyn_fast.ops import cuda_module, launches

KERNELS = ("fused", "triton")  # of our own on CUDA devices: built with the package, and compiled by Triton where they are used
PASSES = ("forward", "data", "weight")  # of a connection: the map, the gradient of its source, the gradient of its weight
DTYPES = (torch.float16, torch.bfloat16)
MAX_TERMS = 8  # kMaxConvTerms of recurrent_conv.h; the launch checks it
MAX_ADDED = 6  # kMaxTerms of area_step.h


def why_not(kernel: tuple[int, ...], channels: tuple[int, int], stride: int, dtype: torch.dtype) -> str | None:
    """Why the fused convolution cannot compute a map (``kernel``: (height, width), or () of a matrix product); None if it can."""
    if dtype not in DTYPES:
        return f"the fused convolution computes in float16 and bfloat16, not {dtype}"
    if any(c % 8 for c in channels):
        return f"{channels[0]} and {channels[1]} channels: the fused convolution takes multiples of 8"
    if len(set(kernel)) > 1:
        return f"the fused convolution takes square kernels, not {kernel[0]} x {kernel[1]}"
    return f"the fused convolution takes strides 1 and 2, not {stride}" if stride > 2 else None


@dataclass(frozen=True)
class ConvTerm:
    """A linear map of one tensor: with output pixel h and tap i, it reads row h * stride + i - padding, or, transposed, the row that a
    convolution of that stride would have sent there, (h + padding - i) / stride."""

    x: Tensor  # [N, H', W', C']
    weight: Tensor  # [C, K, K, C']
    stride: int = 1
    padding: int = 0
    transposed: bool = False


def recurrent_conv_moment_groups(samples: int, height: int, width: int, channels: int) -> list[int]:
    """How :func:`recurrent_conv` leaves moments: [N, groups, 2], and what ``area_step_forward`` must know of them."""
    return cuda_module.moment_groups(samples, height, width, channels)


def recurrent_conv(
    terms: Sequence[ConvTerm],
    bias: Tensor | None,  # [C] float32
    added: Sequence[Tensor],  # each [N, H, W, C]
    drive: Tensor | None,  # [N, H, W, C]
    value: Tensor,  # [N, H, W, C]
    modulator_sum: Tensor | None = None,  # [N, H, W, C]
    moments: Tensor | None = None,  # [N, groups, 2] float32
) -> None:
    """value = s, or drive * (1 + s), with s the sum of the terms, the bias and what is added. Value, modulator_sum (1 + s) and moments are
    written."""
    xs, weights, settings = [t.x for t in terms], [t.weight for t in terms], [(t.stride, t.padding, t.transposed) for t in terms]
    launches.recurrent_conv.on_device(
        xs=xs, weights=weights, settings=settings, bias=bias, added=added, drive=drive, value=value, modulator_sum=modulator_sum,
        moments=moments,
    )  # fmt: skip


def recurrent_conv_weight_grad(
    rows: Tensor,  # [N, H, W, A]
    gathered: Tensor,  # [N, H', W', B]
    grad_weight: Tensor,  # [A, K, K, B] float32
    stride: int,
    padding: int,
) -> None:
    """grad_weight is written. Of a convolution, rows are the output's gradient and gathered is its input; of a transposed one, the other
    way round."""
    launches.recurrent_conv_weight_grad.on_device(rows=rows, gathered=gathered, grad_weight=grad_weight, stride=stride, padding=padding)
