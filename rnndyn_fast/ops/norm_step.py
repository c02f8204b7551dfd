"""``norm_step``: one time step of an area with a squashed modulator, a norm with affine values per channel, or an activation like elu.

Its reference is :func:`rnndyn_fast.reference.rollout.update_area`. With drives b, modulators m, the logistic sigmoid s, a the identity or
relu, and f the activation::

    z = a(sum b) * 2 s(sum m)
    h = f((z - mean) * rstd * gamma + beta)

``mean`` and ``rstd`` are over the map and a group of channels of each sample (GROUP), per channel over samples and map (BATCH), or given
(FIXED: the running statistics of a batch norm). Maps are channels-last and contiguous, [N, H, W, C]: float32 and float64 on the CPU;
float32, float16 and bfloat16 on CUDA devices, where biases, affine values and statistics are float32.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.ops.gate_step import ACTIVATION_NUMBERS

MAX_NORM_TERMS = 6  # kMaxNormTerms of norm_step.h; the core checks it


class NormKind(enum.Enum):
    """Over what statistics are taken; the values are those of norm_step.h."""

    NONE = 0
    GROUP = 1
    BATCH = 2
    FIXED = 3


@dataclass(frozen=True)
class NormRule:
    """What does not change from step to step."""

    kind: NormKind = NormKind.NONE
    groups: int = 1
    eps: float = 1e-5
    activation: Activation = Activation.IDENTITY
    rectify_drive: bool = False


def as_fixed(rule: NormRule) -> NormRule:
    """The rule with statistics that are there already."""
    return replace(rule, kind=NormKind.FIXED)


def norm_numbers(rule: NormRule, *, squash: bool) -> dict[str, Any]:
    """A rule as the kernels take it."""
    activation = ACTIVATION_NUMBERS[rule.activation]
    numbers = {"norm": rule.kind.value, "activation": activation, "rectify_drive": rule.rectify_drive, "squash": squash, "eps": rule.eps}
    return {"groups": rule.groups, **numbers}


@dataclass
class NormStatistics:
    """Statistics of one call: mean and rstd, [N, groups] or [C]; of a batch also the biased variance [C]."""

    mean: Tensor | None = None
    rstd: Tensor | None = None
    variance: Tensor | None = None


def norm_step(
    rule: NormRule,
    drives: Sequence[Tensor],  # each [N, H, W, C]; none counts as zero
    modulators: Sequence[Tensor],  # each [N, H, W, C]
    state: Tensor,  # [N, H, W, C], written
    *,
    drive_bias: Tensor | None = None,  # [C]
    modulator_bias: Tensor | None = None,  # [C]
    gamma: Tensor | None = None,  # [C], with a norm
    beta: Tensor | None = None,  # [C]
    drive_sum: Tensor | None = None,  # [N, H, W, C], written, for the backward pass; may be drives[0]
    modulator_sum: Tensor | None = None,  # [N, H, W, C], likewise
    fixed: tuple[Tensor, Tensor] | None = None,  # running mean and variance [C], of FIXED
) -> NormStatistics:
    """Compute a state, and the sums and statistics that :func:`norm_step_backward` takes.

    Without a drive the value before the norm is zero, whatever modulates it.
    """
    n, _, _, c = state.shape
    found = NormStatistics()
    if rule.kind is NormKind.FIXED:
        assert fixed is not None
        found = NormStatistics(fixed[0].contiguous(), torch.rsqrt(fixed[1] + rule.eps))
    elif rule.kind is not NormKind.NONE:
        size = (n, rule.groups) if rule.kind is NormKind.GROUP else (c,)
        dtype = sums_dtype(state.dtype)
        found = NormStatistics(*(torch.empty(size, dtype=dtype, device=state.device) for _ in range(2)))
        if rule.kind is NormKind.BATCH:
            found.variance = torch.empty((c,), dtype=dtype, device=state.device)
    driven = bool(drives) or drive_bias is not None
    squash = driven and (bool(modulators) or modulator_bias is not None)
    launches.norm_step_forward(
        **norm_numbers(rule, squash=squash), drives=drives, modulators=modulators if squash else [], drive_bias=drive_bias,
        modulator_bias=modulator_bias if squash else None, gamma=gamma, beta=beta, drive_sum=drive_sum, modulator_sum=modulator_sum,
        state=state, mean=found.mean, rstd=found.rstd, variance=found.variance,
    )  # fmt: skip
    return found


def norm_step_backward(
    rule: NormRule,
    grad_state: Tensor,  # [N, H, W, C]
    drive: Tensor | None,  # [N, H, W, C], the sum
    modulator: Tensor | None,  # [N, H, W, C], the sum
    statistics: NormStatistics,
    *,
    gamma: Tensor | None = None,  # [C]
    beta: Tensor | None = None,  # [C]
    grad_drive: Tensor | None = None,  # [N, H, W, C], written; may be ``drive``
    grad_modulator: Tensor | None = None,  # [N, H, W, C], written; may be ``modulator``
    grad_drive_bias: Tensor | None = None,  # [C], written: the sum of the drive's gradient; not on devices
    grad_modulator_bias: Tensor | None = None,  # [C], written, likewise
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of the sums. Returns those of gamma and beta, [C] each."""
    grads = (torch.empty_like(gamma), torch.empty_like(gamma)) if gamma is not None else (None, None)
    launches.norm_step_backward(
        **norm_numbers(rule, squash=drive is not None and modulator is not None), grad_state=grad_state, drive=drive, modulator=modulator,
        gamma=gamma, beta=beta, mean=statistics.mean, rstd=statistics.rstd, grad_drive=grad_drive, grad_modulator=grad_modulator,
        grad_gamma=grads[0], grad_beta=grads[1], grad_drive_bias=grad_drive_bias, grad_modulator_bias=grad_modulator_bias,
    )  # fmt: skip
    return grads
