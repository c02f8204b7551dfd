"""Launches of the CUDA kernels ``norm_step`` and ``depthwise_conv``; see :mod:`rnndyn_fast.ops._launch_cuda`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops._launch_cuda import DTYPES, Launch

NormScalars = tuple[int, int, int, bool, bool, float]  # groups, norm, activation, rectify the drive, squash, eps


def _workspace(launch: Launch, shape: tuple[int, ...], scalars: NormScalars) -> Tensor | None:
    if scalars[1] == 0:
        return None
    return launch.scratch(_launch_cuda.module().norm_step_workspace(list(shape), scalars))


def norm_step_forward(
    scalars: NormScalars,
    drives: Sequence[Tensor],  # each [N, H, W, C]
    modulators: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C] float32
    modulator_bias: Tensor | None,  # [C] float32
    gamma: Tensor | None,  # [C] float32
    beta: Tensor | None,  # [C] float32
    drive_sum: Tensor | None,  # [N, H, W, C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    state: Tensor,  # [N, H, W, C]
    mean: Tensor | None,  # [N, groups] or [C] float32
    rstd: Tensor | None,
    variance: Tensor | None,  # [C] float32
) -> None:
    """Launch ``norm_step`` forward; every output is written into the tensor given for it."""
    launch, full, single = Launch(state), tuple(state.shape), torch.float32
    row = full[3:]
    statistics = (full[0], scalars[0]) if scalars[1] == 1 else row
    take = launch.read if scalars[1] == 3 else launch.write  # (of FIXED they are given)
    workspace = _workspace(launch, full, scalars)
    drive_sum = launch.room_of_sum(drive_sum, drives, drive_bias)
    modulator_sum = launch.room_of_sum(modulator_sum, modulators, modulator_bias)
    _launch_cuda.module().norm_step_forward(
        DTYPES[launch.dtype], launch.queue, list(full), scalars,
        launch.terms(drives, "drives", full),
        launch.terms(modulators, "modulators", full),
        launch.read(drive_bias, "drive_bias", row, single),
        launch.read(modulator_bias, "modulator_bias", row, single),
        launch.read(gamma, "gamma", row, single),
        launch.read(beta, "beta", row, single),
        launch.write(drive_sum, "drive_sum", full),
        launch.write(modulator_sum, "modulator_sum", full),
        launch.write(state, "state", full),
        take(mean, "mean", statistics, single),
        take(rstd, "rstd", statistics, single),
        launch.write(variance, "variance", row, single),
        launch.write(workspace, "workspace", () if workspace is None else workspace.shape, single),
    )  # fmt: skip


def norm_step_backward(
    scalars: NormScalars,
    grad_state: Tensor,  # [N, H, W, C]
    drive: Tensor | None,  # [N, H, W, C]
    modulator: Tensor | None,  # [N, H, W, C]
    gamma: Tensor | None,  # [C] float32
    beta: Tensor | None,  # [C] float32
    mean: Tensor | None,  # [N, groups] or [C] float32
    rstd: Tensor | None,
    grad_drive: Tensor | None,  # [N, H, W, C]
    grad_modulator: Tensor | None,  # [N, H, W, C]
    grad_gamma: Tensor | None,  # [C] float32
    grad_beta: Tensor | None,  # [C] float32
) -> None:
    """Launch ``norm_step`` backward; every gradient is written."""
    launch, full, single = Launch(grad_state), tuple(grad_state.shape), torch.float32
    row = full[3:]
    statistics = (full[0], scalars[0]) if scalars[1] == 1 else row
    workspace = _workspace(launch, full, scalars)
    _launch_cuda.module().norm_step_backward(
        DTYPES[launch.dtype], launch.queue, list(full), scalars,
        launch.read(grad_state, "grad_state", full),
        launch.read(drive, "drive", full),
        launch.read(modulator, "modulator", full),
        launch.read(gamma, "gamma", row, single),
        launch.read(beta, "beta", row, single),
        launch.read(mean, "mean", statistics, single),
        launch.read(rstd, "rstd", statistics, single),
        launch.write(grad_drive, "grad_drive", full),
        launch.write(grad_modulator, "grad_modulator", full),
        launch.write(grad_gamma, "grad_gamma", row, single),
        launch.write(grad_beta, "grad_beta", row, single),
        launch.write(workspace, "workspace", () if workspace is None else workspace.shape, single),
    )  # fmt: skip


def depthwise_conv(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [KH, KW, C]
    bias: Tensor | None,  # [C] float32
    out: Tensor,  # [N, H', W', C]
    step: int,
    dilation: int,
    before: tuple[int, int],
) -> None:
    """Launch ``depthwise_conv``: out is written."""
    (n, h, w, c), (kh, kw, _), launch = x.shape, weight.shape, Launch(x)
    _launch_cuda.module().depthwise_conv(
        DTYPES[launch.dtype],
        launch.queue,
        [n, c, h, w, out.shape[1], out.shape[2], kh, kw, step, dilation, *before],
        launch.read(x, "x", (n, h, w, c)),
        launch.read(weight, "weight", (kh, kw, c)),
        launch.read(bias, "bias", (c,), torch.float32),
        launch.write(out, "out", (n, out.shape[1], out.shape[2], c)),
    )


def depthwise_weight_grad(
    x: Tensor,  # [N, H, W, C]
    grad: Tensor,  # [N, H', W', C]
    grad_weight: Tensor,  # [KH, KW, C] float32
    step: int,
    before: tuple[int, int],
) -> None:
    """Launch ``depthwise_weight_grad``: grad_weight is written."""
    (n, h, w, c), (kh, kw, _), launch, single = x.shape, grad_weight.shape, Launch(x), torch.float32
    sizes = [n, c, h, w, grad.shape[1], grad.shape[2], kh, kw, step, 1, *before]
    splits = _launch_cuda.module().depthwise_weight_grad_splits(DTYPES[launch.dtype], launch.queue[0], sizes)
    partial = launch.scratch(splits, kh, kw, c) if splits > 1 else None
    _launch_cuda.module().depthwise_weight_grad(
        DTYPES[launch.dtype],
        launch.queue,
        sizes,
        launch.read(x, "x", (n, h, w, c)),
        launch.read(grad, "grad", (n, grad.shape[1], grad.shape[2], c)),
        splits,
        launch.write(partial, "partial", (splits, kh, kw, c), single),
        launch.write(grad_weight, "grad_weight", (kh, kw, c), single),
    )
