"""Linear maps of a rollout: one place decides how they are computed. Today that is the vendor's kernels through torch.

Maps are channels-last and contiguous, [M, H, W, C], with M any number of samples and time steps.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor


class Operator(enum.Enum):
    """The linear map of a connection.

    CONV: cross-correlation, weight [C_target, C_source, K, K]; CONV_TRANSPOSE: its transpose, weight [C_source, C_target, K, K]; LINEAR: a
    dense map between 1 x 1 maps, weight [C_target, C_source]; IDENTITY: no parameters.
    """

    CONV = "conv"
    CONV_TRANSPOSE = "conv_transpose"
    LINEAR = "linear"
    IDENTITY = "identity"


@dataclass(frozen=True)
class Geometry:
    """An operator with its stride and padding, the same in both directions; the weight tells the rest."""

    operator: Operator
    stride: int = 1
    padding: int = 0
    output_padding: int = 0


def prepare_weight(geometry: Geometry, weight: Tensor) -> Tensor:
    """The weight in the layout that the engine wants; made once per rollout and used at every step."""
    if geometry.operator is Operator.LINEAR:
        return weight.contiguous()
    return weight.contiguous(memory_format=torch.channels_last)


def convolve(
    geometry: Geometry,
    x: Tensor,  # [M, H, W, C]
    weight: Tensor,  # prepared
) -> Tensor:
    """The linear map, without bias. Returns [M, H', W', C'], contiguous."""
    if geometry.operator is Operator.LINEAR:
        return torch.mm(x.flatten(1), weight.t()).reshape(x.shape[0], 1, 1, -1)
    y = torch.ops.aten.convolution(
        x.permute(0, 3, 1, 2),
        weight,
        None,
        [geometry.stride] * 2,
        [geometry.padding] * 2,
        [1, 1],
        geometry.operator is Operator.CONV_TRANSPOSE,
        [geometry.output_padding] * 2,
        1,
    )
    return y.permute(0, 2, 3, 1).contiguous()


def convolve_backward(
    geometry: Geometry,
    grad: Tensor,  # [M, H', W', C']
    x: Tensor,  # [M, H, W, C]
    weight: Tensor,  # prepared
    *,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`convolve`: of x, [M, H, W, C] contiguous, and of the weight in the parameter's shape; None where not needed."""
    if geometry.operator is Operator.LINEAR:
        flat = grad.flatten(1)
        grad_x = torch.mm(flat, weight).reshape(x.shape) if need_x else None
        return grad_x, torch.mm(flat.t(), x.flatten(1)) if need_weight else None
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight,
        None,
        [geometry.stride] * 2,
        [geometry.padding] * 2,
        [1, 1],
        geometry.operator is Operator.CONV_TRANSPOSE,
        [geometry.output_padding] * 2,
        1,
        [need_x, need_weight, False],
    )
    return grad_x.permute(0, 2, 3, 1).contiguous() if need_x else None, grad_weight.contiguous() if need_weight else None
