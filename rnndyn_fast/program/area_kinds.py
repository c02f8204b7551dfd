"""The kinds of instructions that compute areas from their terms: steps with LayerNorm and pooling, gated cells, norms, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch, _launch_cuda, _launch_steps
from rnndyn_fast.ops.norm_step import NormRule, norm_scalars
from rnndyn_fast.program.kind_table import Call, kind

_STEP_READS = "drives modulators drive_bias modulator_bias gamma beta"


@kind(f"{_STEP_READS} value mean rstd", "value modulator_sum state max_pooled argmax mean_pooled mean rstd", launch=True)
def area_step(
    drives: Sequence[Tensor],
    modulators: Sequence[Tensor] = (),
    drive_bias: Tensor | None = None,
    modulator_bias: Tensor | None = None,
    modulator_complete: bool = False,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    rectify: bool = False,
    complete: bool = False,
    value: Tensor | None = None,
    modulator_sum: Tensor | None = None,
    state: Tensor | None = None,
    max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    mean_pooled: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch.area_step_forward`."""
    _launch.area_step_forward(
        drives, modulators, drive_bias, modulator_bias, modulator_complete, gamma, beta, eps, rectify, complete,
        value, modulator_sum, state, max_pooled, argmax, mean_pooled, mean, rstd,
    )  # fmt: skip


@kind("value gamma beta moments", "value state max_pooled argmax mean_pooled mean rstd", launch=True)
def finish_area_step(
    value: Tensor,
    moments: Tensor,
    groups: tuple[int, int],
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    rectify: bool,
    mean: Tensor,
    rstd: Tensor,
    state: Tensor | None = None,
    max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    mean_pooled: Tensor | None = None,
) -> None:
    """On devices: norm, activation and pooling of a value whose moments the fused convolution left."""
    forms = (state, max_pooled, argmax, mean_pooled, mean, rstd)
    _launch_cuda.area_step_forward([], [], None, None, False, gamma, beta, eps, rectify, value, None, *forms, moments, groups)


@kind(
    "grad_states grad_max_pooled argmax grad_mean_pooled value drives drive_bias modulator_sum mean rstd gamma beta grad_drive_sum "
    "grad_gamma grad_beta",
    "grad_drive grad_drive_sum grad_modulator grad_gamma grad_beta partial",
    launch=True,
)
def area_step_backward(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    grad_states: Sequence[Tensor] = (),
    grad_max_pooled: Tensor | None = None,
    argmax: Tensor | None = None,
    grad_mean_pooled: Tensor | None = None,
    multiplicative: bool = False,
    value: Tensor | None = None,
    drives: Sequence[Tensor] = (),
    drive_bias: Tensor | None = None,
    modulator_sum: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    rectify: bool = False,
    grad_drive: Tensor | None = None,
    grad_drive_sum: Tensor | None = None,
    grad_modulator: Tensor | None = None,
    grad_gamma: Tensor | None = None,
    grad_beta: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch.area_step_backward`."""
    _launch.area_step_backward(
        shape, dtype, grad_states, grad_max_pooled, argmax, grad_mean_pooled, multiplicative, value, drives, drive_bias, modulator_sum,
        mean, rstd, gamma, beta, rectify, grad_drive, grad_drive_sum, grad_modulator, grad_gamma, grad_beta, partial,
    )  # fmt: skip


GateScalars = tuple[int, float, list[float], list[float], int]


@kind("ports biases", "sums states", launch=True)
def gate_step(
    scalars: GateScalars,
    ports: Sequence[Sequence[Tensor]],
    biases: Sequence[Tensor | None],
    sums: Sequence[Tensor | None],
    states: Sequence[Tensor],
) -> None:
    """As :func:`rnndyn_fast.ops._launch.gate_step`."""
    _launch.gate_step(scalars, ports, biases, sums, states, [], backward=False)


@kind("ports grads more", "grad_ports grad_biases workspace", launch=True)
def gate_step_backward(
    scalars: GateScalars,
    ports: Sequence[Tensor],
    grads: Sequence[Tensor],
    more: Sequence[Tensor | None],
    grad_ports: Sequence[Tensor],
    grad_biases: Sequence[Tensor | None],
    workspace: Tensor | None,
) -> None:
    """The gradients of a cell's ports, from the sums of the ports and the gradients of its states."""
    _launch.gate_step(scalars, [[p] for p in ports], [], [], grads, grad_ports, more, grad_biases, backward=True, workspace=workspace)


@kind(
    "drives modulators drive_bias modulator_bias gamma beta mean rstd",
    "drive_sum modulator_sum state mean rstd variance workspace",
    launch=True,
)
def norm_step(
    rule: NormRule,
    squash: bool,
    drives: Sequence[Tensor],
    modulators: Sequence[Tensor],
    drive_bias: Tensor | None,
    modulator_bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    drive_sum: Tensor | None,
    modulator_sum: Tensor | None,
    state: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    variance: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch_steps.norm_step_forward`."""
    _launch_steps.norm_step_forward(
        norm_scalars(rule, squash), drives, modulators, drive_bias, modulator_bias, gamma, beta, drive_sum, modulator_sum, state, mean,
        rstd, variance, workspace,
    )  # fmt: skip


@kind(
    "grad_state drive modulator gamma beta mean rstd",
    "grad_drive grad_modulator grad_gamma grad_beta grad_drive_bias grad_modulator_bias workspace",
    launch=True,
)
def norm_step_backward(
    rule: NormRule,
    squash: bool,
    grad_state: Tensor,
    drive: Tensor | None,
    modulator: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    grad_drive: Tensor | None,
    grad_modulator: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    grad_drive_bias: Tensor | None,
    grad_modulator_bias: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch_steps.norm_step_backward`."""
    _launch_steps.norm_step_backward(
        norm_scalars(rule, squash), grad_state, drive, modulator, gamma, beta, mean, rstd, grad_drive, grad_modulator, grad_gamma,
        grad_beta, grad_drive_bias, grad_modulator_bias, workspace,
    )  # fmt: skip


@kind("variance", "rstd", prepared=True)
def reciprocal_deviation(variance: Tensor, rstd: Tensor, eps: float) -> Call:
    """rstd = 1 / sqrt(variance + eps)."""
    return lambda: torch.add(variance, eps, out=rstd).rsqrt_()


@kind("x", "out", prepared=True)
def scale(x: Tensor, out: Tensor, factor: float) -> Call:
    """out = x * factor."""
    return partial(torch.mul, x, factor, out=out)


@kind("grad more state", "grad_drive grad_bias workspace", launch=True)
def activation_backward(
    activation: int,
    grad: Tensor,
    more: Tensor | None,
    state: Tensor,
    grad_drive: Tensor,
    grad_bias: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """As :func:`rnndyn_fast.ops._launch_steps.activation_backward`."""
    _launch_steps.activation_backward(activation, grad, more, state, grad_drive, grad_bias, workspace)


# (On devices: the gradient of the argument from that of the value, and the value.)
_SLOPES: dict[int, Callable[[Tensor, Tensor, Tensor], Any]] = {
    1: lambda grad, y, out: torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=out),
    2: lambda grad, y, out: torch.ops.aten.elu_backward.grad_input(grad, 1, 1, 1, True, y, grad_input=out),
    3: lambda grad, y, out: torch.ops.aten.tanh_backward.grad_input(grad, y, grad_input=out),
}


@kind("grad state", "grad_drive")
def activation_slope(activation: int, grad: Tensor, state: Tensor, grad_drive: Tensor) -> None:
    """:func:`activation_backward` on devices, by PyTorch."""
    _SLOPES[activation](grad, state, grad_drive)
