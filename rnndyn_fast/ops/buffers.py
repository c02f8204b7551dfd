"""Large buffers that are used again.

A rollout writes hundreds of megabytes that live for one training step. Taken from the system anew each time, their first touch costs more
than the arithmetic (a page fault per 4 KiB, and on virtual machines one to the host besides). So large buffers lie in a region of address
space of our own, which becomes memory as it is touched: each takes the smallest gap that holds it, and when no tensor uses it any more, its
bytes join the gaps beside it. What one pass of a training step held is room for the next one, however that is cut.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import first_element

_LARGE = 1 << 20  # bytes; smaller ones the C library reuses by itself
_PAGE = 4096  # bytes; buffers are whole pages
_SPAN = 64 << 20  # bytes of a region, at least, where the system does not let us have all at once
_PATIENCE = 4096  # large buffers handed out, after which what none of them reached is given back to the system


class Region:
    """Address space, cut into buffers and the gaps between them; ``gaps`` has first byte and end of each, ascending."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._map = mmap.mmap(-1, nbytes, **flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._map)
        self._users: dict[int, weakref.ref[memoryview]] = {}  # by first byte
        self._freed: deque[tuple[int, int]] = deque()  # by any thread, at any moment
        self.gaps = [(0, nbytes)]
        self.touched = 0  # no buffer has reached further since memory was given back
        self._reach = 0  # nor, since the last trim, than here
        self._clean: set[tuple[int, int]] = set()  # gaps without memory

    def smallest_gap(self, nbytes: int) -> int | None:
        """The number of the smallest gap that holds so many bytes, the first of several."""
        self._join()
        fitting = [(end - first, i) for i, (first, end) in enumerate(self.gaps) if end - first >= nbytes]
        return min(fitting)[1] if fitting else None

    @cached_property
    def _whole(self) -> Tensor:
        with torch.inference_mode(False):  # (whoever comes first, training writes here too)
            return torch.frombuffer(self._bytes, dtype=torch.uint8)

    @property
    def start(self) -> int:
        """Address of the first byte."""
        return first_element(self._whole)

    def alias(self, address: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory at an address as a tensor, whether it is in use or not."""
        return self._whole.view(dtype).as_strided(size, stride, (address - self.start) // dtype.itemsize)

    def in_use(self) -> bool:
        """Whether any tensor lies here."""
        self._join()
        return bool(self._users)

    def take(self, gap: int, nbytes: int, dtype: torch.dtype = torch.uint8, count: int = -1) -> Tensor:
        """The first bytes of a gap, until no tensor uses them: as so many elements, or as many as fit."""
        first, end = self.gaps[gap]
        last = first + nbytes
        self._clean.discard((first, end))
        self.gaps[gap : gap + 1] = [(last, end)] if last < end else []
        self.touched, self._reach = max(self.touched, last), max(self._reach, last)
        view, freed = self._bytes[first:last], self._freed
        self._users[first] = weakref.ref(view, lambda _: freed.append((first, last)))
        return torch.frombuffer(view, dtype=dtype, count=count)  # (whose storage holds the view, which nobody else does)

    def _join(self) -> None:
        """Make gaps of the buffers that were freed."""
        while self._freed:
            first, last = self._freed.popleft()
            del self._users[first]
            i = next((i for i, gap in enumerate(self.gaps) if gap[0] > first), len(self.gaps))
            if i < len(self.gaps) and self.gaps[i][0] == last:
                last = self.gaps.pop(i)[1]
            if i and self.gaps[i - 1][1] == first:
                first = self.gaps.pop(i - 1)[0]
                i -= 1
            self.gaps.insert(i, (first, last))

    def give_back(self, beyond: int = 0) -> int:
        """Give the memory of gaps back to the system, from byte ``beyond`` on. Returns the bytes that they had."""
        self._join()
        if not CAN_GIVE_BACK:
            return 0
        parts = [(max(first, beyond), min(end, self.touched)) for first, end in self.gaps if (first, end) not in self._clean]
        parts = [(-(-first // _PAGE) * _PAGE, end if end == self.touched else end // _PAGE * _PAGE) for first, end in parts]
        parts = [(first, end) for first, end in parts if first < end]
        for first, end in parts:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
        if parts and parts[-1][1] == self.touched:
            self.touched = parts[-1][0]
        if not beyond:
            self._clean = set(self.gaps)
        return sum(end - first for first, end in parts)

    def trim(self) -> None:
        """Give back what no buffer has reached since the last time."""
        self.give_back(self._reach)
        self._reach = max(self._users, default=0)


CAN_GIVE_BACK = hasattr(mmap, "MADV_DONTNEED")

_lock = threading.Lock()
_regions: list[Region] = []
_handed_out = 0

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
    """An uninitialised contiguous tensor, like ``torch.empty``; on the CPU, a large one takes memory that nothing uses any more."""
    size = torch.Size(shape)
    device = getattr(_where, "device", None)
    if device is not None:
        return torch.empty(size, dtype=dtype, device=device)
    nbytes = math.prod(size) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(size, dtype=dtype)
    return _take(nbytes, dtype, math.prod(size)).view(size)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics, parameters and sums over time, where maps have this dtype: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def arena(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised bytes of whose parts :func:`alias_in_regions` makes tensors."""
    if device.type != "cpu":
        return torch.empty((nbytes,), dtype=torch.uint8, device=device)
    return _take(max(nbytes, 1), torch.uint8, max(nbytes, 1))[:nbytes]


def alias_in_regions(address: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """Memory of a buffer as a tensor that does not hold it."""
    region = _region_of(address)
    assert region is not None
    return region.alias(address, (nbytes // dtype.itemsize,), (1,), dtype)


def lies_in_region(tensor: Tensor) -> bool:
    """Whether :func:`alias_in_regions` knows its memory."""
    return _region_of(first_element(tensor)) is not None


def _region_of(address: int) -> Region | None:
    return next((region for region in _regions if region.start <= address < region.start + region.nbytes), None)


def _take(nbytes: int, dtype: torch.dtype, count: int) -> Tensor:
    global _handed_out
    nbytes = -(-nbytes // _PAGE) * _PAGE
    with _lock:
        _handed_out += 1
        if _handed_out % _PATIENCE == 0:
            for region in _regions:
                region.trim()
        for region in _regions:
            gap = region.smallest_gap(nbytes)
            if gap is not None:
                return region.take(gap, nbytes, dtype, count)
        return _new_region(nbytes).take(0, nbytes, dtype, count)


def _new_region(nbytes: int) -> Region:
    """As much as there is memory (address space costs nothing), or what the system allows."""
    if not _regions and hasattr(os, "sysconf"):
        try:
            _regions.append(Region(max(nbytes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))))
            return _regions[-1]
        except (OSError, ValueError):
            pass  # a limit on address space
    _regions.append(Region(max(nbytes, _SPAN)))
    return _regions[-1]


def release_buffers() -> int:
    """Give the memory of buffers that no tensor uses back to the system. Returns the bytes given back."""
    with _lock:
        return sum(region.give_back() for region in _regions)
