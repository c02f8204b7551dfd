"""Norms and changes of long trajectories: every value is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from rnndyn_fast.ops import core, cuda_module, sequence_launches
from rnndyn_fast.reference.trajectory_norms import trajectory_norms as reference_trajectory_norms

_NATIVE_DTYPES = (torch.float32, torch.float64)


def can_run_trajectory_norms(values: Tensor, raise_error: bool = False) -> bool:  # [T, N, ...]
    """Whether the native backend takes these values: float32 or float64 on the CPU; float32, float16 or bfloat16 on a CUDA device.

    Raises:
        ValueError: it does not, and ``raise_error``; the message is the reason.
    """
    reason = core.unavailable
    if reason is None and core.on_device(values):
        reason = cuda_module.why_not(values)
    elif reason is None and (values.device.type != "cpu" or values.dtype not in _NATIVE_DTYPES):
        reason = f"values are {values.dtype} on {values.device}, and the native backend takes float32 and float64 on the CPU"
    if reason is not None and raise_error:
        raise ValueError(f"backend='native': {reason}; backend='reference' takes them")
    return reason is None


@torch.no_grad()
def trajectory_norms(
    values: Tensor,  # [T, N, ...]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""L2 norms :math:`\lVert x_n[t] \rVert` over all but the first two dimensions, and changes :math:`\lVert x_n[t + 1] - x_n[t] \rVert`.

    Args:
        values: [T, N, ...], floating point, T and N of at least 1, of any strides: maps in channels-last memory are read without a copy.
        backend: "native", "reference" (plain PyTorch), or None: native where ``can_run_trajectory_norms`` says so.

    Returns:
        norm [T, N] and change [T - 1, N], float64. NaN and infinite values give NaN or infinity.

    Raises:
        ValueError: a shape or backend is wrong.
        TypeError: a dtype is wrong.

    Differentiable: no; computed without a graph.
    Forward-mode: no.
    Double backward: no.
    Deterministic: yes, for any number of threads.
    Memory: the results; the reference takes two copies of a time step in float64.

    >>> norm, change = trajectory_norms(torch.tensor([[[3.0, 4.0]], [[3.0, 9.0]]]))
    >>> norm[0].tolist(), change.tolist()
    ([5.0], [[5.0]])
    """
    if backend not in (None, "native", "reference"):
        raise ValueError(f"backend: expected 'native', 'reference' or None, got {backend!r}")
    if not values.is_floating_point():
        raise TypeError(f"values: expected a floating-point dtype, got {values.dtype}")
    if values.dim() < 3 or 0 in values.shape:
        raise ValueError(f"values: expected [T, N, ...] with no empty dimension, got {list(values.shape)}")
    if not can_run_trajectory_norms(values, raise_error=backend == "native") or backend == "reference":
        return reference_trajectory_norms(values)
    rows = _rows(values)
    norm = torch.empty(rows.shape[:2], dtype=torch.float64, device=rows.device)
    change = torch.empty((rows.shape[0] - 1, rows.shape[1]), dtype=torch.float64, device=rows.device)
    sequence_launches.trajectory_norms(values=rows, norm=norm, change=change)
    return norm, change


def _rows(values: Tensor) -> Tensor:  # [T, N, ...] -> [T, N, D]
    """The values of a sample in the order of memory, which a norm does not care about; a copy only where they have gaps."""
    order = sorted(range(2, values.dim()), key=lambda d: (values.stride(d), values.shape[d]), reverse=True)
    rows = values.permute(0, 1, *order).flatten(2)
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()
