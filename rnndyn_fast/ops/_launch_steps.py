"""Launches of ``norm_step``, ``activation_backward``, ``depthwise_conv``, ``separable_conv`` and ``channels_last``: like
:mod:`rnndyn_fast.ops._launch`, whose rules hold here too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch, _launch_steps_cuda
from rnndyn_fast.ops._launch import address_of
from rnndyn_fast.ops._launch_steps_cuda import NormScalars


def _workspace(given: Tensor | None, sizes: tuple[int, int, int, int]) -> tuple[Tensor, int]:
    return _launch.scratch_of(given, _launch.norm_workspace_size(*sizes))


def _statistics_size(n: int, c: int, scalars: NormScalars) -> tuple[int, ...]:
    return (n, scalars[0]) if scalars[1] == 1 else (c,)


def norm_step_forward(
    scalars: NormScalars,
    drives: Sequence[Tensor],  # each [N, H, W, C]
    modulators: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_bias: Tensor | None,  # [C]
    gamma: Tensor | None,  # [C]
    beta: Tensor | None,  # [C]
    drive_sum: Tensor | None,  # [N, H, W, C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    state: Tensor,  # [N, H, W, C]
    mean: Tensor | None,  # [N, groups] or [C]
    rstd: Tensor | None,
    variance: Tensor | None,  # [C]
    workspace: Tensor | None = None,  # float32, of norm_workspace_size; not on devices
) -> None:
    """Launch ``norm_step`` forward; every output is written into the tensor given for it."""
    if _launch.on_device(state):
        return _launch_steps_cuda.norm_step_forward(
            scalars, drives, modulators, drive_bias, modulator_bias, gamma, beta, drive_sum, modulator_sum, state, mean, rstd, variance
        )
    n, h, w, c = full = tuple(state.shape)
    dtype, statistics = state.dtype, _statistics_size(n, c, scalars)
    groups, norm, activation, rectify, squash, eps = scalars
    core = _launch._core
    launch = core.norm_step_forward_float32 if dtype == torch.float32 else core.norm_step_forward_float64
    held, scratch = _workspace(workspace, (n, h * w, c, groups))
    launch(
        [n, h * w, c, groups], norm, activation, rectify, squash, eps, torch.get_num_threads(),
        [address_of(x, f"drives[{i}]", full, dtype) for i, x in enumerate(drives)],
        [address_of(x, f"modulators[{i}]", full, dtype) for i, x in enumerate(modulators)],
        address_of(drive_bias, "drive_bias", (c,), dtype),
        address_of(modulator_bias, "modulator_bias", (c,), dtype),
        address_of(gamma, "gamma", (c,), dtype),
        address_of(beta, "beta", (c,), dtype),
        address_of(drive_sum, "drive_sum", full, dtype),
        address_of(modulator_sum, "modulator_sum", full, dtype),
        address_of(state, "state", full, dtype),
        address_of(mean, "mean", statistics, dtype),
        address_of(rstd, "rstd", statistics, dtype),
        address_of(variance, "variance", (c,), dtype),
        scratch,
    )  # fmt: skip
    del held


def norm_step_backward(
    scalars: NormScalars,
    grad_state: Tensor,  # [N, H, W, C]
    drive: Tensor | None,  # [N, H, W, C]
    modulator: Tensor | None,  # [N, H, W, C]
    gamma: Tensor | None,  # [C]
    beta: Tensor | None,  # [C]
    mean: Tensor | None,  # [N, groups] or [C]
    rstd: Tensor | None,
    grad_drive: Tensor | None,  # [N, H, W, C]
    grad_modulator: Tensor | None,  # [N, H, W, C]
    grad_gamma: Tensor | None,  # [C]
    grad_beta: Tensor | None,  # [C]
    grad_drive_bias: Tensor | None,  # [C]; not on devices
    grad_modulator_bias: Tensor | None,  # [C]; not on devices
    workspace: Tensor | None = None,  # float32, of norm_workspace_size; not on devices
) -> None:
    """Launch ``norm_step`` backward; every gradient is written."""
    if _launch.on_device(grad_state):
        return _launch_steps_cuda.norm_step_backward(
            scalars, grad_state, drive, modulator, gamma, beta, mean, rstd, grad_drive, grad_modulator, grad_gamma, grad_beta
        )
    n, h, w, c = full = tuple(grad_state.shape)
    dtype, statistics = grad_state.dtype, _statistics_size(n, c, scalars)
    groups, norm, activation, rectify, squash, eps = scalars
    core = _launch._core
    launch = core.norm_step_backward_float32 if dtype == torch.float32 else core.norm_step_backward_float64
    held, scratch = _workspace(workspace, (n, h * w, c, groups))
    launch(
        [n, h * w, c, groups], norm, activation, rectify, squash, eps, torch.get_num_threads(),
        address_of(grad_state, "grad_state", full, dtype),
        address_of(drive, "drive", full, dtype),
        address_of(modulator, "modulator", full, dtype),
        address_of(gamma, "gamma", (c,), dtype),
        address_of(beta, "beta", (c,), dtype),
        address_of(mean, "mean", statistics, dtype),
        address_of(rstd, "rstd", statistics, dtype),
        address_of(grad_drive, "grad_drive", full, dtype),
        address_of(grad_modulator, "grad_modulator", full, dtype),
        address_of(grad_gamma, "grad_gamma", (c,), dtype),
        address_of(grad_beta, "grad_beta", (c,), dtype),
        address_of(grad_drive_bias, "grad_drive_bias", (c,), dtype),
        address_of(grad_modulator_bias, "grad_modulator_bias", (c,), dtype),
        scratch,
    )  # fmt: skip
    del held


def activation_backward(
    activation: int,
    grad: Tensor,  # [N, H, W, C]
    more: Tensor | None,  # [N, H, W, C], added to it
    state: Tensor,  # [N, H, W, C]
    grad_drive: Tensor,  # [N, H, W, C]
    grad_bias: Tensor | None,  # [C]
    workspace: Tensor | None = None,  # float32, of gate_workspace_size, where grad_bias is wanted
) -> None:
    """Launch ``activation_backward``: grad_drive and grad_bias are written."""
    n, h, w, c = full = tuple(state.shape)
    core, dtype = _launch._core, state.dtype
    launch = core.activation_backward_float32 if dtype == torch.float32 else core.activation_backward_float64
    held, scratch = (None, 0) if grad_bias is None else _launch.scratch_of(workspace, _launch.gate_workspace_size(n * h * w, c))
    launch(
        activation, n * h * w, c, torch.get_num_threads(), address_of(grad, "grad", full, dtype), address_of(more, "more", full, dtype),
        address_of(state, "state", full, dtype), address_of(grad_drive, "grad_drive", full, dtype),
        address_of(grad_bias, "grad_bias", (c,), dtype), scratch,
    )  # fmt: skip
    del held


def depthwise_conv(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [KH, KW, I, C']
    bias: Tensor | None,  # [C']
    out: Tensor,  # [N, H', W', C']
    step: int,
    dilation: int,
    before: tuple[int, int],
) -> None:
    """Launch ``depthwise_conv``: out is written."""
    kh, kw, inputs, c = weight.shape
    if _launch.on_device(x):
        return _launch_steps_cuda.depthwise_conv(x, weight.flatten(2), bias, out, step, dilation, before)
    launch = _launch._core.depthwise_conv_float32 if x.dtype == torch.float32 else _launch._core.depthwise_conv_float64
    launch(
        [x.shape[0], c, x.shape[1], x.shape[2], out.shape[1], out.shape[2], kh, kw, step, dilation, *before, *_group(x, inputs, c)],
        torch.get_num_threads(),
        address_of(x, "x", tuple(x.shape), x.dtype),
        address_of(weight, "weight", (kh, kw, inputs, c), x.dtype),
        address_of(bias, "bias", (c,), x.dtype),
        address_of(out, "out", (x.shape[0], out.shape[1], out.shape[2], c), x.dtype),
    )


def separable_conv(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [KH, KW, I, M]
    bias: Tensor | None,  # [M]
    pointwise: Tensor,  # [M, P], P a multiple of 32
    out: Tensor,  # [N, H', W', C']
    step: int,
    before: tuple[int, int],
) -> None:
    """Launch ``separable_conv``: out is written."""
    kh, kw, inputs, c = weight.shape
    _launch._core.separable_conv(
        [x.shape[0], c, x.shape[1], x.shape[2], out.shape[1], out.shape[2], kh, kw, step, 1, *before, *_group(x, inputs, c)],
        torch.get_num_threads(),
        address_of(x, "x", tuple(x.shape), torch.float32),
        address_of(weight, "weight", (kh, kw, inputs, c), torch.float32),
        address_of(bias, "bias", (c,), torch.float32),
        out.shape[3],
        pointwise.shape[1],
        address_of(pointwise, "pointwise", (c, pointwise.shape[1]), torch.float32),
        address_of(out, "out", (x.shape[0], out.shape[1], out.shape[2], out.shape[3]), torch.float32),
    )


def _group(x: Tensor, inputs: int, channels: int) -> tuple[int, int]:
    """Channels of a group in a map and in the result."""
    groups = x.shape[3] // inputs
    if groups * inputs != x.shape[3] or channels % groups:
        raise ValueError(f"weight: expected whole groups of {inputs} of {x.shape[3]} channels, and of the result's {channels}")
    return inputs, channels // groups


def depthwise_weight_grad(
    x: Tensor,  # [N, H, W, C]
    grad: Tensor,  # [N, H', W', C']
    grad_weight: Tensor,  # [KH, KW, I, C']
    step: int,
    before: tuple[int, int],
) -> None:
    """Launch ``depthwise_weight_grad``: grad_weight is written."""
    kh, kw, inputs, c = grad_weight.shape
    if _launch.on_device(x):
        return _launch_steps_cuda.depthwise_weight_grad(x, grad, grad_weight.flatten(2), step, before)
    core = _launch._core
    launch = core.depthwise_weight_grad_float32 if x.dtype == torch.float32 else core.depthwise_weight_grad_float64
    launch(
        [x.shape[0], c, x.shape[1], x.shape[2], grad.shape[1], grad.shape[2], kh, kw, step, 1, *before, *_group(x, inputs, c)],
        torch.get_num_threads(),
        address_of(x, "x", tuple(x.shape), x.dtype),
        address_of(grad, "grad", (x.shape[0], grad.shape[1], grad.shape[2], c), x.dtype),
        address_of(grad_weight, "grad_weight", (kh, kw, inputs, c), x.dtype),
    )


def channels_last(
    x: Tensor,  # [N, C, H, W]
    out: Tensor,  # [N, H, W, C]
) -> None:
    """Launch ``channels_last``: out is written."""
    n, c, h, w = x.shape
    launch = _launch._core.channels_last_float32 if x.dtype == torch.float32 else _launch._core.channels_last_float64
    launch([n, c, h * w], torch.get_num_threads(), address_of(x, "x", (n, c, h, w), x.dtype), address_of(out, "out", (n, h, w, c), x.dtype))
