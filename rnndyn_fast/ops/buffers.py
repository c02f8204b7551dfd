"""Large buffers that are used again.

A rollout writes hundreds of megabytes that live for one training step. Taken from the system anew each time, their first touch costs more
than the arithmetic (a page fault per 4 KiB, and on virtual machines one to the host besides). So large buffers come from here: a storage
that no tensor uses any more is handed out again. torch's allocator for GPUs does the same.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes; smaller ones the C library reuses by itself
_PATIENCE = 4096  # large buffers handed out, after which one that was not among them is given back to the system


@dataclass
class _Kept:
    storage: torch.UntypedStorage
    nbytes: int
    last_use: int

    @property
    def free(self) -> bool:
        return torch._C._storage_Use_Count(self.storage._cdata) == 1  # nobody but us


_lock = threading.Lock()
_kept: list[_Kept] = []
_clock = 0


_where = threading.local()


@contextmanager
def buffers_on(device: torch.device) -> Iterator[None]:
    """Buffers, and what torch makes without being told where, are on this device; on a GPU all of them come from torch's allocator."""
    before = getattr(_where, "device", None)
    _where.device = None if device.type == "cpu" else device
    try:
        with torch.device(device):
            yield
    finally:
        _where.device = before


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor, like ``torch.empty``; on the CPU, a large one takes a storage that nothing uses any more."""
    size = torch.Size(shape)
    device = getattr(_where, "device", None)
    if device is not None:
        return torch.empty(size, dtype=dtype, device=device)
    nbytes = math.prod(size) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(size, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(_take(nbytes), 0, size, _strides(size))


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics, parameters and sums over time, where maps have this dtype: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Arena:
    """Room for tensors that are needed together and given up together, taken once and used for one group after another."""

    def __init__(self, nbytes: int) -> None:
        self._room = empty((max(nbytes, 1),), torch.uint8)
        self._used = 0

    @staticmethod
    def size(shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that a tensor takes in an arena."""
        return -(-math.prod(shape) * dtype.itemsize // 64) * 64

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        first, self._used = self._used, self._used + self.size(shape, dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        return self._room[first : first + nbytes].view(dtype).view(*shape)

    def reset(self) -> None:
        """Everything taken is given up; the caller uses none of it any more."""
        self._used = 0


def _strides(size: torch.Size) -> list[int]:
    """Of a contiguous tensor."""
    return [math.prod(size[i + 1 :]) for i in range(len(size))]


def _take(nbytes: int) -> torch.UntypedStorage:
    global _clock
    with _lock:
        _clock += 1
        fitting = [k for k in _kept if nbytes <= k.nbytes <= 2 * nbytes and k.free]
        if fitting:
            best = min(fitting, key=lambda k: (k.nbytes, -k.last_use))
            best.last_use = _clock
            return best.storage
        # Nothing fits: the moment to part with what has not been wanted for long.
        _kept[:] = [k for k in _kept if not k.free or _clock - k.last_use < _PATIENCE]
        storage = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        _kept.append(_Kept(storage, nbytes, _clock))
        return storage


def release_buffers() -> int:
    """Give the buffers that no tensor uses back to the system. Returns the bytes given back."""
    with _lock:
        free = [k for k in _kept if k.free]
        released = sum(k.nbytes for k in free)
        _kept[:] = [k for k in _kept if k not in free]
        return released


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors begin at one place of one storage."""
    return share_storage(a, b) and a.storage_offset() == b.storage_offset()
