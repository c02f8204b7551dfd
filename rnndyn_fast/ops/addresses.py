"""Addresses of tensors, which are taken in this file alone."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence

import torch
from torch import Tensor


def first_element(tensor: Tensor) -> int:
    """Its address. Whoever uses it holds the tensor meanwhile."""
    return tensor.data_ptr()


class Use(enum.Enum):
    """What a kernel does with a buffer: reads it, writes all it later reads, or adds to it."""

    READ = "read"
    WRITE = "write"
    UPDATE = "update"


def device_address(
    tensor: Tensor | None,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    use: Use,
    *,
    rows_apart: bool = False,
) -> int:
    """The address of a contiguous tensor on a device; 0 for None. ``use`` is for those who watch launches (the tests' SIMT harness).

    ``rows_apart``: only the elements of a row, the last dimension, need be adjacent.
    """
    if tensor is None:
        return 0
    contiguous = tensor.is_contiguous() or (rows_apart and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1))
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device or not contiguous:
        raise ValueError(
            f"{name}: expected a contiguous tensor {list(shape)} of {dtype} on {device}, got {list(tensor.shape)} of {tensor.dtype} "
            f"on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
    return first_element(tensor)


def device_queue(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and the stream that torch uses there now."""
    if device.type != "cuda":
        raise ValueError(f"expected tensors on a CUDA device, got {device}")
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def tensor_at(address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """Memory of the CPU as a tensor, flat, which does not hold it. Whoever uses it holds what it belongs to meanwhile."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=dtype)
