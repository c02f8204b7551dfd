"""Batches of a split, read ahead in a background thread, and their normalisation."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch


class BatchSource(Protocol):
    """What `BatchLoader` reads from; `ImageSplit` is one."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class BatchLoader:
    """Iterates over batches (images uint8 [N, 3, H, W], labels int64 [N]) of `split`.

    Order: ascending, or with `shuffle` a permutation drawn from (seed, epoch); call `set_epoch(e)` before each epoch.
    A thread reads `prefetch` batches ahead; what it raises is raised in the consumer, and it ends when the consumer
    stops early. Several iterations of one loader may run side by side.

    Args:
        split: the images.
        batch_size: N >= 1; the last batch may be smaller.
        shuffle: permute the images.
        seed: int >= 0, with the epoch it determines the permutation.
        drop_last: leave out a last batch of fewer than `batch_size` images.
        prefetch: batches read ahead; 0 reads in the caller's thread.

    Raises:
        TypeError: `batch_size`, `seed` or `prefetch` is not an int.
        ValueError: one of them is too small, or no batch would come out.

    Deterministic: yes.
    Memory: `prefetch` + 2 batches.
    """

    def __init__(
        self,
        split: BatchSource,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 2,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("prefetch", prefetch, 0)):
            _check_int(name, value, least)
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.prefetch = prefetch
        self.epoch = 0
        if len(self) == 0:
            raise ValueError(f"split: {len(split)} image(s) make no batch of batch_size = {batch_size} with drop_last = {drop_last}")

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the iterations that begin from now on; `epoch` >= 0."""
        _check_int("epoch", epoch, 0)
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = len(self.split)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(count) if self.shuffle else np.arange(count)
        batches = [order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]
        if self.prefetch == 0:
            return (self.split.read(indices) for indices in batches)
        return read_ahead(self.split.read, batches, self.prefetch)


Request = TypeVar("Request")
Item = TypeVar("Item")


def read_ahead(read: Callable[[Request], Item], requests: Sequence[Request], prefetch: int) -> Iterator[Item]:
    """`read(request)` for every request in order, computed up to `prefetch` ahead by a thread.

    What it raises is raised in the consumer; the thread ends when the consumer stops early.
    """
    ready: queue.Queue[Item | BaseException] = queue.Queue(maxsize=prefetch)
    stop = threading.Event()

    def put(item: Item | BaseException) -> None:
        # A plain put() would wait for ever on a consumer that has left, so look at `stop` now and then.
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for request in requests:
                if stop.is_set():
                    return
                put(read(request))
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, name="rnndyn-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in requests:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:  # also runs when the consumer breaks off or drops the iterator
        stop.set()
        thread.join()


def normalise(
    images: torch.Tensor,  # [N, 3, H, W]
    mean: np.ndarray,  # [3]
    std: np.ndarray,  # [3]
) -> torch.Tensor:
    """Per channel c, `y = (v - mean_c / 255) / (std_c / 255)`, where v is x / 255 of a uint8 image, x of a float one.

    Args:
        images: [N, 3, H, W], uint8 in 0-255 or floating point in 0-1 (as `TrivialAugmentWide` returns).
        mean: 3 numbers, scale 0-255.
        std: 3 positive numbers, scale 0-255.

    Returns:
        float32 [N, 3, H, W] on the device of `images`.

    Raises:
        TypeError: `images` is neither a uint8 nor a floating-point tensor.
        ValueError: wrong shape of `images`, or `mean`, `std` are not 3 finite (positive) numbers.

    Differentiable: in floating-point `images`. Deterministic: yes. Memory: the result.
    Source: the published evaluation transform (arXiv 2308.12435).

    >>> normalise(torch.full((1, 3, 1, 1), 51, dtype=torch.uint8), [0.0] * 3, [255.0, 127.5, 51.0]).flatten()
    tensor([0.2000, 0.4000, 1.0000])
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images: expected a tensor [N, 3, H, W], got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected shape [N, 3, H, W], got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected dtype uint8 (0-255) or floating point (0-1), got {images.dtype}")
    centre, spread = _three_numbers("mean", mean), _three_numbers("std", std)
    if spread.min() <= 0:
        raise ValueError(f"std: expected positive numbers, got {spread.tolist()}")
    # One multiplication and one addition per pixel; the constants are formed in float64.
    unit = 255.0 if images.dtype != torch.uint8 else 1.0
    scale = torch.as_tensor(unit / spread, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
    shift = torch.as_tensor(-centre / spread, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
    return torch.addcmul(shift, images.to(torch.float32), scale)


def check_unit_range(images: torch.Tensor) -> None:  # [N, ...]
    """Raise ``ValueError``, with the range seen, for floating-point images that are not in 0..1: 0..255, or normalised already.

    Rounding of resizing and colour conversion, 1e-3, is let pass.
    """
    if not images.is_floating_point() or not images.numel():
        return
    low, high = (float(value) for value in images.aminmax())
    if low < -1e-3 or high > 1 + 1e-3:
        kind = "; are they on the scale 0..255?" if low >= 0 and high <= 255 else "; are they normalised already?" if low < 0 else ""
        raise ValueError(f"expected floating-point images in 0..1 (or uint8 in 0..255), got values from {low:.4g} to {high:.4g}{kind}")


def _three_numbers(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (3,) or not np.isfinite(array).all():
        raise ValueError(f"{name}: expected 3 finite numbers (scale 0-255), got {array.tolist()}")
    return array


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
