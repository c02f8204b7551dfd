"""The engines of our own on CUDA devices, :data:`rnndyn_fast.ops.fused_conv.KERNELS`, whose launches take the same arguments: the fused
convolution of the CUDA kernels, and that of the Triton kernels."""

from __future__ import annotations

from types import ModuleType

import torch

from rnndyn_fast.ops import fused_conv, triton_conv
from rnndyn_fast.ops.engines import Geometry, Operator


def kernels_of(engine: str) -> ModuleType:
    """The module that launches an engine's kernels: ``recurrent_conv``, its ``..._moment_groups`` and its ``..._weight_grad``."""
    return {"fused": fused_conv, "triton": triton_conv}[engine]


def why_not(engine: str, geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why an engine cannot compute this map; None if it can."""
    if geometry.operator is Operator.IDENTITY:
        return "nothing to compute"
    if engine == "fused":
        return fused_conv.why_not(weight_shape[2:], (weight_shape[0], weight_shape[1]), geometry.stride, dtype)
    return triton_conv.why_not(weight_shape[2:], geometry.stride, dtype)


def can_run_triton(geometry: Geometry, weight_shape: tuple[int, ...], dtype: torch.dtype, *, raise_error: bool = False) -> bool:
    """Whether the Triton kernels compute this map; with ``raise_error``, ``ValueError`` with the reason instead of False."""
    reason = why_not("triton", geometry, weight_shape, dtype)
    if reason and raise_error:
        raise ValueError(f'engine="triton": {reason}')
    return reason is None
