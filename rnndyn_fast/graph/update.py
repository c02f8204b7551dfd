"""One time step of one area (or many independent ones): its terms, some of them still to be computed, to its state.

The convolution that comes last gets an epilogue: the area's other terms and the statistics of its norm are done as its results leave it,
and what remains for ``area_step`` is norm, activation and pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rnndyn_fast.graph.fused_step import fused_step
from rnndyn_fast.graph.operands import AreaOperands, area_step_forward, at_most
from rnndyn_fast.ops._launch import MAX_TERMS
from rnndyn_fast.ops.buffers import same_place
from rnndyn_fast.ops.convolution import MAX_SUMMED, Weight, can_end, can_sum, convolve, convolve_sum
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.ops.fused_conv import MAX_TERMS as MAX_FUSED
from rnndyn_fast.ops.winograd_conv import WinogradMap


@dataclass(frozen=True, eq=False)
class Pending:
    """A term that is still to be computed: a linear map of what it reads."""

    weight: Weight
    x: Tensor  # [M, H, W, C]


Value = Tensor | Pending


def _sums(terms: Sequence[Pending]) -> list[list[Pending]]:
    """The terms in groups that one call sums."""
    groups: list[list[Pending]] = []
    for term in terms:
        group = next((g for g in groups if len(g) < MAX_SUMMED and can_sum([t.weight for t in (*g, term)])), None)
        if group is None:
            groups.append([term])
        else:
            group.append(term)
    return groups


def _computed(group: Sequence[Pending]) -> Tensor:
    if len(group) == 1:
        return convolve(group[0].weight, group[0].x)
    return convolve_sum([t.weight for t in group], [t.x for t in group])


def _split(terms: Sequence[Value]) -> tuple[list[Tensor], list[list[Pending]]]:
    return [t for t in terms if isinstance(t, Tensor)], _sums([t for t in terms if isinstance(t, Pending)])


def _take_last(groups: list[list[Pending]]) -> list[Pending] | None:
    """Of the groups, the one that an epilogue should end; the Winograd domain, where results are written once, rather than added to."""
    ending = [g for g in groups if all(can_end(t.weight) for t in g)]
    if not ending:
        return None
    last = max(ending, key=lambda g: (isinstance(g[0].weight.choice.map, WinogradMap), len(g)))
    groups.remove(last)
    return last


def _fused(values: Sequence[Value]) -> list[Pending]:
    """The terms that one launch of a GPU's fused convolution computes and sums."""
    pending = [v for v in values if isinstance(v, Pending)]
    return [v for v in pending if "forward" in v.weight.choice.fused][:MAX_FUSED]


def _without(values: Sequence[Value], fused: Sequence[Pending]) -> list[Tensor]:
    """The other terms, computed."""
    others = [v for v in values if not any(v is f for f in fused)]
    return [v if isinstance(v, Tensor) else _computed([v]) for v in others]


def update_area(
    area: AreaOperands,
    drives: Sequence[Value],  # each [N, H, W, C]
    modulators: Sequence[Value],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_bias: Tensor | None,  # [C]
    value: Tensor | None,  # [N, H, W, C]; with a norm
    mean: Tensor | None,  # [N]; with a norm
    rstd: Tensor | None,  # [N]; with a norm
    modulator_sum: Tensor | None = None,  # [N, H, W, C]
    **outputs: Any,  # Tensor or None: the buffers of area_step_forward
) -> None:
    """Compute an area's step; the buffers are those of :func:`_launch.area_step_forward`, and ``value`` may be the first drive's memory."""
    fused = _fused(modulators or drives)
    if fused:
        terms = [t.weight.fused.term(t.x) for t in fused]
        shape = fused[0].weight.output_shape(fused[0].x.shape)
        fused_step(
            area, terms, shape, _without(drives, fused), _without(modulators, fused), drive_bias, modulator_bias, value,
            modulates=bool(modulators), modulator_sum=modulator_sum, mean=mean, rstd=rstd, **outputs,
        )  # fmt: skip
        return
    driving, driving_sums = _split(drives)
    modulating, modulating_sums = _split(modulators)
    # (At the same place of one storage: `value` is the drive.)
    in_place = value is not None and bool(driving) and same_place(driving[0], value)
    last, modulates = None, bool(modulating_sums)
    if area.gamma is not None and not (in_place and modulates):
        last = _take_last(modulating_sums if modulates else driving_sums)
    driving += [_computed(g) for g in driving_sums]
    modulating += [_computed(g) for g in modulating_sums]
    if last is None:
        area_step_forward(
            driving, modulating, drive_bias=drive_bias, modulator_bias=modulator_bias, gamma=area.gamma, beta=area.beta, eps=area.eps,
            rectify=area.rectify, value=value, modulator_sum=modulator_sum, mean=mean, rstd=rstd, **outputs,
        )  # fmt: skip
        return
    assert value is not None
    epilogue = Epilogue(
        at_most(driving[in_place:], MAX_TERMS), at_most(modulating, MAX_TERMS), modulates, drive_bias, modulator_bias, modulator_sum, mean,
        rstd, area.eps,
    )  # fmt: skip
    convolve_sum([t.weight for t in last], [t.x for t in last], value, epilogue, accumulate=in_place)
    area_step_forward(
        [value], complete=True, gamma=area.gamma, beta=area.beta, eps=area.eps, rectify=area.rectify, value=value, mean=mean, rstd=rstd,
        **outputs,
    )  # fmt: skip
