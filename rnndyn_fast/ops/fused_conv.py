"""The fused convolution on CUDA devices (``recurrent_conv``, docs/kernels.md) as an engine of rollouts.

float16 and bfloat16 maps, float32 sums on tensor cores. One launch computes and sums any number of terms, adds what is there already and
the bias, multiplies where the interaction is multiplicative, and leaves LayerNorm's moments.
"""

from __future__ import annotations

import torch

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
