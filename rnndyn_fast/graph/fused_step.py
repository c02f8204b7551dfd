"""One update of an area on a CUDA device, with the fused convolution doing what is left of its terms and the interaction in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rnndyn_fast.graph.operands import AreaOperands, area_step_forward, at_most
from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops._launch_cuda import ConvTerm
from rnndyn_fast.ops.buffers import empty, sums_dtype
from rnndyn_fast.ops.fused_conv import MAX_ADDED


def fused_step(
    area: AreaOperands,
    terms: Sequence[ConvTerm],  # convolutions yet to be computed, of the modulator where there is one, else of the drive
    shape: Sequence[int],  # of their result, (N, H, W, C)
    drives: Sequence[Tensor],  # the other drive terms, each [N, H, W, C]
    modulators: Sequence[Tensor],  # the other modulator terms, each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_bias: Tensor | None,  # [C]
    value: Tensor | None,  # [N, H, W, C]
    *,
    modulates: bool,
    modulator_sum: Tensor | None = None,  # [N, H, W, C]
    **outputs: Any,  # Tensor or None: the buffers of area_step_forward
) -> None:
    """``area_step`` forward with terms still to be computed.

    They are computed, summed with the others of their kind, and, where the kernel can (an additive area, or one drive without a
    bias), the interaction and LayerNorm's moments are done as well: what is left is to normalise, rectify and pool.
    """
    dtype, gamma, beta, eps, rectify = terms[0].x.dtype, area.gamma, area.beta, area.eps, area.rectify
    if modulates and (len(drives) != 1 or drive_bias is not None):
        total = empty(shape, dtype)
        _launch_cuda.recurrent_conv(terms, None, at_most(modulators, MAX_ADDED), None, total)
        area_step_forward(
            drives, [total], drive_bias=drive_bias, modulator_bias=modulator_bias, value=value, modulator_sum=modulator_sum,
            gamma=gamma, beta=beta, eps=eps, rectify=rectify, **outputs,
        )  # fmt: skip
        return
    if value is None:
        value = empty(shape, dtype)
    groups = _launch_cuda.recurrent_conv_moment_groups(*shape) if gamma is not None else None
    moments = empty((shape[0], groups[0], 2), sums_dtype(dtype)) if groups is not None else None
    _launch_cuda.recurrent_conv(
        terms,
        modulator_bias if modulates else drive_bias,
        at_most(modulators if modulates else drives, MAX_ADDED),
        drives[0] if modulates else None,
        value,
        modulator_sum,
        moments,
    )
    if moments is None:  # no norm: the value is complete, and what is wanted of it may be nothing
        if any(t is not None for t in outputs.values()):
            area_step_forward([value], rectify=rectify, **outputs)
        return
    rest = [outputs.get(name) for name in ("state", "max_pooled", "argmax", "mean_pooled", "mean", "rstd")]
    launch: Any = _launch_cuda.area_step_forward
    launch([], [], None, None, False, gamma, beta, eps, rectify, value, None, *rest, moments, groups)
