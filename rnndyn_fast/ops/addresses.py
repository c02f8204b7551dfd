"""Addresses of tensors, which are taken in this file alone."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def first_element(tensor: Tensor) -> int:
    """Its address. Whoever uses it holds the tensor meanwhile."""
    return tensor.data_ptr()


def tensor_at(address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """Memory of the CPU as a tensor, flat, which does not hold it. Whoever uses it holds what it belongs to meanwhile."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=dtype)
