"""One update of an area on a CUDA device, with the fused convolution doing what is left of its terms and the interaction in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rnndyn_fast.graph.operands import Operands, area_step_forward, at_most
from rnndyn_fast.graph.schedule import Term
from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops.buffers import empty
from rnndyn_fast.ops.fused_conv import MAX_ADDED, MAX_TERMS


def fusible(operands: Operands, drives: Sequence[Term], modulators: Sequence[Term], read_here_alone: Callable[[Term], bool]) -> list[Term]:
    """The terms of an update that one launch can compute and sum: of the modulator, where there is one, else of the drive.

    ``read_here_alone``: whether a term is still to be evaluated, and nobody reads it but this update.
    """

    def can(term: Term) -> bool:
        weight = operands.weights[term.drive]
        return weight is not None and "forward" in weight.choice.fused and read_here_alone(term)

    return [t for t in modulators or drives if can(t)][:MAX_TERMS]


def fused_step(
    operands: Operands,
    fused: Sequence[int],  # drives that are yet to be computed
    sources: Sequence[Tensor],  # what they read, each [N, H', W', C']
    drives: Sequence[Tensor],  # the other drive terms, each [N, H, W, C]
    modulators: Sequence[Tensor],  # the other modulator terms, each [N, H, W, C]
    *,
    modulates: bool,
    drive_bias: Tensor | None,  # [C]
    modulator_bias: Tensor | None,  # [C]
    gamma: Tensor | None,  # [H, W, C]
    beta: Tensor | None,  # [H, W, C]
    eps: float,
    rectify: bool,
    value: Tensor | None,  # [N, H, W, C]
    modulator_sum: Tensor | None = None,  # [N, H, W, C]
    **outputs: Any,  # Tensor or None: the buffers of area_step_forward
) -> None:
    """``area_step`` forward with terms still to be computed. With none it is just that.

    Else they are computed, summed with the others of their kind, and, where the kernel can (an additive area, or one drive without a
    bias), the interaction and LayerNorm's moments are done as well: what is left is to normalise, rectify and pool.

    Args:
        modulates: whether the area has a modulator; then the terms to be computed are of it, else of the drive.
    """
    norm: dict[str, Any] = {"gamma": gamma, "beta": beta, "eps": eps, "rectify": rectify}
    if not fused:
        area_step_forward(
            drives, modulators, drive_bias=drive_bias, modulator_bias=modulator_bias, value=value, modulator_sum=modulator_sum,
            **norm, **outputs,
        )  # fmt: skip
        return
    weights = [w for i in fused if (w := operands.weights[i]) is not None]
    terms = [w.fused.term(x) for w, x in zip(weights, sources, strict=True)]
    shape = weights[0].fused.output_shape(sources[0].shape)
    if modulates and (len(drives) != 1 or drive_bias is not None):
        total = empty(shape, operands.dtype)
        _launch_cuda.recurrent_conv(terms, None, at_most(modulators, MAX_ADDED), None, total)
        area_step_forward(
            drives, [total], drive_bias=drive_bias, modulator_bias=modulator_bias, value=value, modulator_sum=modulator_sum,
            **norm, **outputs,
        )  # fmt: skip
        return
    if value is None:
        value = empty(shape, operands.dtype)
    groups = _launch_cuda.recurrent_conv_moment_groups(*shape) if gamma is not None else None
    moments = empty((shape[0], groups[0], 2), operands.sums_dtype) if groups is not None else None
    _launch_cuda.recurrent_conv(
        terms,
        modulator_bias if modulates else drive_bias,
        at_most(modulators if modulates else drives, MAX_ADDED),
        drives[0] if modulates else None,
        value,
        modulator_sum,
        moments,
    )
    names = ("state", "max_pooled", "argmax", "mean_pooled", "mean", "rstd")
    rest = [outputs.get(name) for name in names]
    if moments is None:  # no norm: the value is complete, and what is wanted of it may be nothing
        if any(t is not None for t in rest):
            wanted: dict[str, Any] = dict(zip(names, rest, strict=True))
            area_step_forward([value], rectify=rectify, **wanted)
        return
    _launch_cuda.area_step_forward([], [], None, None, False, gamma, beta, eps, rectify, value, None, *rest, moments, groups)
