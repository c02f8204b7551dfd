"""The fused convolution on CUDA devices (``recurrent_conv``, docs/kernels.md) as an engine of rollouts.

float16 and bfloat16 maps, float32 sums on tensor cores. One launch computes and sums any number of terms, adds what is there already and
the bias, multiplies where the interaction is multiplicative, and leaves LayerNorm's moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops._launch_cuda import ConvTerm
from rnndyn_fast.ops.buffers import empty

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


class FusedWeight:
    """A weight laid out for the fused convolution, once per rollout and direction: [C_out, K, K, C_in]."""

    def __init__(
        self,
        weight: Tensor,  # [C_out, C_in, K, K], or transposed [C_in, C_out, K, K]
        stride: int,
        padding: int,
        transposed: bool,
    ) -> None:
        self.weight = weight
        self.stride, self.padding, self.transposed = stride, padding, transposed

    @cached_property
    def _rows_first(self) -> Tensor:
        return self.weight.permute(0, 2, 3, 1).contiguous()

    @cached_property
    def _columns_first(self) -> Tensor:
        return self.weight.permute(1, 2, 3, 0).contiguous()

    def term(
        self,
        x: Tensor,  # [N, H, W, C_in]
    ) -> ConvTerm:
        """The map of x, to be summed with others."""
        return ConvTerm(x, self._columns_first if self.transposed else self._rows_first, self.stride, self.padding, self.transposed)

    def data_grad(
        self,
        grad: Tensor,  # [N, H', W', C_out]
        shape: Sequence[int],
    ) -> Tensor:
        """The gradient of x, [N, H, W, C_in]: the same launch, on the transposed term."""
        grad_x = empty(shape, grad.dtype)
        weight = self._rows_first if self.transposed else self._columns_first
        _launch_cuda.recurrent_conv([ConvTerm(grad, weight, self.stride, self.padding, not self.transposed)], None, [], None, grad_x)
        return grad_x

    def weight_grad(
        self,
        grad: Tensor,  # [N, H', W', C_out]
        x: Tensor,  # [N, H, W, C_in]
    ) -> Tensor:
        """The gradient of the weight, in its shape, float32."""
        rows, gathered = (x, grad) if self.transposed else (grad, x)
        first, second, kernel, _ = self.weight.shape
        grad_weight = empty((first, kernel, kernel, second), torch.float32)
        _launch_cuda.recurrent_conv_weight_grad(rows, gathered, grad_weight, self.stride, self.padding)
        return grad_weight.permute(0, 3, 1, 2).contiguous()


def fused_sum(
    weights: Sequence[FusedWeight],  # at most MAX_TERMS
    xs: Sequence[Tensor],  # each [N, H, W, C_in]
    out: Tensor,  # [N, H', W', C_out]
) -> Tensor:
    """The sum of the maps, in one launch, written into ``out``."""
    _launch_cuda.recurrent_conv([w.term(x) for w, x in zip(weights, xs, strict=True)], None, [], None, out)
    return out
