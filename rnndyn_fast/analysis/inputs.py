"""Checks and conversions of what users hand to the analysis: NumPy or torch arrays, of any float or integer dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(name: str, value: Any) -> Tensor:
    """The value as a detached tensor: torch tensors as they are, anything array-like through NumPy."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(f"{name}: expected a dense tensor, got {'a nested tensor' if value.is_nested else value.layout}")
        return value.detach()
    if np.ma.is_masked(value):
        raise TypeError(f"{name}: expected an array without masked entries, got {int(np.ma.count_masked(value))} of them")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected a numeric array or tensor, got {type(value).__name__} of dtype {array.dtype}")
    if not array.flags.writeable or not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))  # a copy, which torch can share
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(f"{name}: dtype {array.dtype} has no counterpart in PyTorch") from error


def as_floats(name: str, value: Any, shape: str, sizes: tuple[int | None, ...]) -> Tensor:
    """A floating-point tensor of the given sizes (None: any, but at least 1); half precision becomes float32."""
    tensor = as_tensor(name, value)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, shape {shape}, got dtype {tensor.dtype}")
    wanted = ", ".join("any" if size is None else str(size) for size in sizes)
    if tensor.dim() != len(sizes) or any(s is not None and s != v for s, v in zip(sizes, tensor.shape, strict=True)):
        raise ValueError(f"{name}: expected shape {shape} = [{wanted}], got {list(tensor.shape)}")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: expected shape {shape} with no empty dimension, got {list(tensor.shape)}")
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_labels(name: str, value: Any, samples: int, classes: int) -> Tensor:  # [N]
    """Labels [N] as int64 in [0, C); floats are taken where they are whole numbers."""
    tensor = as_tensor(name, value)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name}: expected integers [N], got dtype {tensor.dtype}")
    if tensor.dim() != 1 or tensor.shape[0] != samples:
        raise ValueError(f"{name}: expected shape [N] = [{samples}], got {list(tensor.shape)}")
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):  # (of which PyTorch has no smallest and largest)
        tensor = tensor.double()
    if tensor.is_floating_point():
        if bool(torch.isnan(tensor).any()):
            raise ValueError(f"{name}: expected integers [N] in [0, C) = [0, {classes}), got NaN")
        if bool((tensor != tensor.round()).any()):
            bad = tensor[tensor != tensor.round()][0].item()
            raise ValueError(f"{name}: expected integers [N] in [0, C) = [0, {classes}), got {bad}")
    low, high = tensor.min().item(), tensor.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"{name}: expected integers [N] in [0, C) = [0, {classes}), got values in [{low}, {high}]")
    return tensor.long()


def require_finite(name: str, value: Tensor) -> None:
    """Raises ValueError naming the first entry that is NaN or infinite."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        where = torch.nonzero(bad)[0].tolist()
        raise ValueError(f"{name}: expected finite values, got {value[tuple(where)].item()} at {where}")


def require_finite_norms(name: str, value: Tensor, norm: Tensor) -> None:  # [..., D], [...]
    """As require_finite, but looks at every value only where a norm, which is at hand, is not finite."""
    if not bool(torch.isfinite(norm).all()):
        require_finite(name, value)
        raise ValueError(f"{name}: expected vectors whose L2 norm fits {value.dtype}, got values up to {value.abs().max():.3g}")


def require_log_probs(name: str, value: Tensor) -> None:  # [..., C]
    """Raises ValueError where there is a NaN or +inf (-inf is the logarithm of 0)."""
    # NaN or +inf survive every maximum, and the maximum needs no table of its own size.
    if not bool((value.amax() < torch.inf).item()):
        require_finite(name, torch.nan_to_num(value, nan=torch.nan, posinf=torch.inf, neginf=0.0))
