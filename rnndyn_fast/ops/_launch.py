"""The only file that takes addresses of tensors: it hands them to the native core.

Callers hold every tensor in their own frame for the length of the call, so that no address outlives its storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

unavailable: str | None = None  # why there is no native core, if there is none
try:
    from rnndyn_fast import _core

    _core.build_info()  # raises for an RNNDYN_ISA that cannot run
except (ImportError, ValueError) as error:
    unavailable = f"the native core cannot be used ({error})"

MAX_TERMS = 6  # kMaxTerms of area_step.h; the core checks it


def build_info() -> dict[str, Any]:
    """What the native core was built from and runs with; raises ``ImportError`` with the reason where there is none."""
    if unavailable:
        raise ImportError(unavailable)
    return _core.build_info()


def _address(tensor: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if tensor is None:
        return 0
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous CPU tensor {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype} "
            f"on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return tensor.data_ptr()


def _addresses(tensors: Sequence[Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[int]:
    return [_address(t, f"{name}[{i}]", shape, dtype) for i, t in enumerate(tensors)]


def num_chunks(height: int, width: int, channels: int) -> int:
    """Chunks of rows in which a map is reduced (area_step.h)."""
    return _core.num_chunks(height, width, channels)


def area_step_forward(
    drives: Sequence[Tensor],  # each [N, H, W, C]
    modulators: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_bias: Tensor | None,  # [C]
    gamma: Tensor | None,  # [H, W, C]
    beta: Tensor | None,  # [H, W, C]
    eps: float,
    rectify: bool,
    value: Tensor | None,  # [N, H, W, C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    state: Tensor | None,  # [N, H, W, C]
    max_pooled: Tensor | None,  # [N, H // 2, W // 2, C]
    argmax: Tensor | None,  # [N, H // 2, W // 2, C] uint8
    mean_pooled: Tensor | None,  # [N, 1, 1, C]
    mean: Tensor | None,  # [N]
    rstd: Tensor | None,  # [N]
) -> None:
    """Launch ``area_step`` forward; every output is written into the tensor given for it."""
    n, h, w, c = full = tuple(drives[0].shape)
    dtype = drives[0].dtype
    pooled = (n, h // 2, w // 2, c)
    launch = _core.area_step_forward_float32 if dtype == torch.float32 else _core.area_step_forward_float64
    launch(
        [n, h, w, c],
        torch.get_num_threads(),
        _addresses(drives, "drives", full, dtype),
        _address(drive_bias, "drive_bias", (c,), dtype),
        _addresses(modulators, "modulators", full, dtype),
        _address(modulator_bias, "modulator_bias", (c,), dtype),
        _address(gamma, "gamma", (h, w, c), dtype),
        _address(beta, "beta", (h, w, c), dtype),
        eps,
        rectify,
        _address(value, "value", full, dtype),
        _address(modulator_sum, "modulator_sum", full, dtype),
        _address(state, "state", full, dtype),
        _address(max_pooled, "max_pooled", pooled, dtype),
        _address(argmax, "argmax", pooled, torch.uint8),
        _address(mean_pooled, "mean_pooled", (n, 1, 1, c), dtype),
        _address(mean, "mean", (n,), dtype),
        _address(rstd, "rstd", (n,), dtype),
    )


def area_step_backward(
    shape: tuple[int, int, int, int],  # N, H, W, C
    dtype: torch.dtype,
    grad_states: Sequence[Tensor],  # each [N, H, W, C]
    grad_max_pooled: Tensor | None,  # [N, H // 2, W // 2, C]
    argmax: Tensor | None,  # [N, H // 2, W // 2, C] uint8
    grad_mean_pooled: Tensor | None,  # [N, 1, 1, C]
    multiplicative: bool,
    value: Tensor | None,  # [N, H, W, C]
    drives: Sequence[Tensor],  # each [N, H, W, C]
    drive_bias: Tensor | None,  # [C]
    modulator_sum: Tensor | None,  # [N, H, W, C]
    mean: Tensor | None,  # [N]
    rstd: Tensor | None,  # [N]
    gamma: Tensor | None,  # [H, W, C]
    beta: Tensor | None,  # [H, W, C]
    rectify: bool,
    grad_drive: Tensor | None,  # [N, H, W, C]
    grad_drive_sum: Tensor | None,  # [N, H, W, C]
    grad_modulator: Tensor | None,  # [N, H, W, C]
    grad_gamma: Tensor | None,  # [H, W, C]
    grad_beta: Tensor | None,  # [H, W, C]
) -> None:
    """Launch ``area_step`` backward; grad_drive and grad_modulator are written, the other gradients are added to."""
    n, h, w, c = shape
    pooled = (n, h // 2, w // 2, c)
    partial = torch.empty((n, num_chunks(h, w, c), 2), dtype=torch.float64) if gamma is not None else None
    launch = _core.area_step_backward_float32 if dtype == torch.float32 else _core.area_step_backward_float64
    launch(
        list(shape),
        torch.get_num_threads(),
        _addresses(grad_states, "grad_states", shape, dtype),
        _address(grad_max_pooled, "grad_max_pooled", pooled, dtype),
        _address(argmax, "argmax", pooled, torch.uint8),
        _address(grad_mean_pooled, "grad_mean_pooled", (n, 1, 1, c), dtype),
        multiplicative,
        _address(value, "value", shape, dtype),
        _addresses(drives, "drives", shape, dtype),
        _address(drive_bias, "drive_bias", (c,), dtype),
        _address(modulator_sum, "modulator_sum", shape, dtype),
        _address(mean, "mean", (n,), dtype),
        _address(rstd, "rstd", (n,), dtype),
        _address(gamma, "gamma", (h, w, c), dtype),
        _address(beta, "beta", (h, w, c), dtype),
        rectify,
        _address(grad_drive, "grad_drive", shape, dtype),
        _address(grad_drive_sum, "grad_drive_sum", shape, dtype),
        _address(grad_modulator, "grad_modulator", shape, dtype),
        _address(grad_gamma, "grad_gamma", (h, w, c), dtype),
        _address(grad_beta, "grad_beta", (h, w, c), dtype),
        0 if partial is None else partial.data_ptr(),
    )


def _row_address(tensor: Tensor | None, name: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[int, int]:
    """Address and row stride of a matrix whose rows are contiguous, but may lie apart."""
    if tensor is None:
        return 0, 0
    contiguous = tensor.dim() == 2 and (tensor.shape[1] == 1 or tensor.stride(1) == 1)
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu" or not contiguous:
        raise ValueError(
            f"{name}: expected a CPU tensor {list(shape)} of {dtype} with contiguous rows, got {list(tensor.shape)} of "
            f"{tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"
        )
    return tensor.data_ptr(), tensor.stride(0)


def readout_zones(
    representations: Tensor,  # [N, D]
    previous: Tensor | None,  # [N, D]
    log_probs: Tensor | None,  # [N, C]
    labels: Tensor,  # [N] int64
    bias: Tensor | None,  # [C]
    weight_norm: Tensor,  # [C]
    inverse_distance: Tensor,  # [C, C]
    cosine: Tensor,  # [N, C], products r . w_c on entry
    tables: Sequence[Tensor],  # [N] each: predicted int64, norm, cos_predicted, cos_label, margin, boundary, change
) -> None:
    """Launch ``readout_zones`` for one time step; cosine and every table are written. Labels must lie in [0, C)."""
    (n, d), c, dtype = representations.shape, cosine.shape[1], representations.dtype
    names = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")
    launch = _core.readout_zones_float32 if dtype == torch.float32 else _core.readout_zones_float64
    launch(
        [n, d, c],
        torch.get_num_threads(),
        *_row_address(representations, "representations", (n, d), dtype),
        *_row_address(previous, "previous", (n, d), dtype),
        *_row_address(log_probs, "log_probs", (n, c), dtype),
        _address(labels, "labels", (n,), torch.int64),
        _address(bias, "bias", (c,), dtype),
        _address(weight_norm, "weight_norm", (c,), dtype),
        _address(inverse_distance, "inverse_distance", (c, c), dtype),
        _address(cosine, "cosine", (n, c), dtype),
        *(
            _address(table, name, (n,), torch.int64 if name == "predicted" else dtype)
            for table, name in zip(tables, names, strict=True)
        ),
    )
