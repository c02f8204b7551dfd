"""Batches of a split, read ahead in a thread or by worker processes, and their normalisation."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from rnndyn_fast.data.augment import Part
from rnndyn_fast.data.order import cuts, cuts_by_lane, in_lanes


class BatchSource(Protocol):
    """What `BatchLoader` reads from; `ImageSplit` is one. An attribute ``shards``, integers [n], says which file each image is in."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class Batch(NamedTuple):
    """A batch, or a process's part of it."""

    images: torch.Tensor  # [N, 3, H, W]
    labels: torch.Tensor  # int64 [N], or float32 [N, classes]: shares of classes
    total: int  # images of the batch in all processes


@dataclass(frozen=True)
class Request:
    """What a batch is read by: its images, and which part of which batch of which epoch they are."""

    indices: np.ndarray
    epoch: int
    number: int
    part: Part


# From a request and its uint8 images and labels to the batch's images and labels. Pickled where there are workers.
Transform = Callable[[Request, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class BatchLoader:
    """Iterates over batches (images uint8 [N, 3, H, W], labels int64 [N]) of `split`.

    Order: ascending, or with `shuffle` a permutation drawn from (seed, epoch); call `set_epoch(e)` before each epoch.
    A thread reads `prefetch` batches ahead, or `workers` processes do, each with a file handle of its own; what they raise is raised in the
    consumer. Batches do not depend on who reads them. A thread ends when the consumer stops early, workers with the loader. Several
    iterations of one loader may run side by side, but with workers a new one ends the one before.

    Of several processes each takes its part of every batch: the parts of a batch are disjoint, and all together they are the batch.
    Parts are of equal size or one image apart, and the first process's is never empty; but where the split has `shards` and is shuffled,
    a process takes the images of its own shards (:func:`rnndyn_fast.data.order.in_lanes`), so that sizes differ, and may be 0.

    Args:
        split: the images.
        batch_size: N >= 1 of all processes together; the last batch may be smaller.
        shuffle: permute the images.
        seed: int >= 0, with the epoch it determines the permutation.
        drop_last: leave out a last batch of fewer than `batch_size` images.
        prefetch: batches read ahead (by each worker); 0 reads in the caller's thread.
        workers: processes that read and transform; 0: none.
        transform: what becomes of images and labels, see `Transform`.
        rank, count: which of how many processes this one is.

    Raises:
        TypeError: `batch_size`, `seed`, `prefetch` or `workers` is not an int.
        ValueError: one of them is too small, or no batch would come out.

    Deterministic: yes.
    Memory: `prefetch` + 2 batches; with workers `workers` * max(2, `prefetch`) batches.
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
        workers: int = 0,
        transform: Transform | None = None,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("prefetch", prefetch, 0), ("workers", workers, 0),
        ):  # fmt: skip
            _check_int(name, value, least)
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.prefetch = prefetch
        self.workers = workers
        self.transform = transform
        self.rank, self.count = rank, count
        self.epoch = self.first = 0
        self._workers: Any = None  # they stay for all epochs
        if len(self) == 0:
            raise ValueError(f"split: {len(split)} image(s) make no batch of batch_size = {batch_size} with drop_last = {drop_last}")

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.drop_last or rest == 0 else full + 1

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the permutation of the iterations that begin from now on, `epoch` >= 0, and the batch they begin with."""
        _check_int("epoch", epoch, 0)
        _check_int("first", first, 0)
        self.epoch, self.first = epoch, first

    def requests(self) -> list[Request]:
        """What this process reads in an epoch."""
        rng, images = np.random.default_rng([self.seed, self.epoch]), len(self.split)
        shards: np.ndarray | None = getattr(self.split, "shards", None)
        lane = None
        if self.shuffle and shards is not None:
            order, lane = in_lanes(shards, rng)
        else:
            order = rng.permutation(images) if self.shuffle else np.arange(images)
        found = []
        for number in range(self.first, len(self)):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            batch = order[rows]
            if lane is None:
                ends = cuts(len(batch), self.count)
            else:
                by_lane = np.argsort(lane[rows], kind="stable")
                batch, ends = batch[by_lane], cuts_by_lane(lane[rows][by_lane], int(lane.max()) + 1, self.count)
            mine = slice(ends[self.rank], ends[self.rank + 1])
            found.append(Request(batch[mine], self.epoch, number, Part(mine, len(batch))))
        return found

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((batch.images, batch.labels) for batch in self.batches())

    def batches(self) -> Iterator[Batch]:
        """The batches, each with the number of images it has in all processes."""
        read = _Reading(self.split, self.transform)
        if self.workers:
            if self._workers is None:
                self._workers = _worker_loader(read, _Requests(self), self.workers, max(2, self.prefetch))
            return iter(self._workers)
        requests = self.requests()
        # Images are transformed in the caller's thread: two threads that compute would both use all processors.
        images = map(read.read, requests) if self.prefetch == 0 else read_ahead(read.read, requests, self.prefetch)
        return (read.transformed(request, *found) for request, found in zip(requests, images, strict=True))


class _Reading(torch.utils.data.Dataset[Batch]):
    """Reads and transforms what is requested; goes to worker processes, where the split opens its file anew."""

    def __init__(self, split: BatchSource, transform: Transform | None) -> None:
        self.split, self.transform = split, transform

    def __getitem__(self, request: Request) -> Batch:
        return self.transformed(request, *self.read(request))

    def read(self, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split.read(request.indices)

    def transformed(self, request: Request, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        if self.transform is not None and len(images):
            images, labels = self.transform(request, images, labels)
        return Batch(images, labels, request.part.total)


class _Requests(torch.utils.data.Sampler[Request]):
    """The requests of the epoch that a loader is at."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Request]:
        return iter(self.loader.requests())

    def __len__(self) -> int:
        return len(self.loader) - self.loader.first


def _worker_loader(read: _Reading, requests: _Requests, workers: int, prefetch: int) -> Any:
    # Workers are forked from a server process that has imported what they need, but has no threads and no open files.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rnndyn_fast.data", "kornia"])
    return torch.utils.data.DataLoader(
        read, batch_size=None, sampler=requests, num_workers=workers, prefetch_factor=prefetch,
        multiprocessing_context=context, generator=torch.Generator(), persistent_workers=True,
    )  # fmt: skip


Item = TypeVar("Item")
Wanted = TypeVar("Wanted")


def read_ahead(read: Callable[[Wanted], Item], requests: Sequence[Wanted], prefetch: int) -> Iterator[Item]:
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
