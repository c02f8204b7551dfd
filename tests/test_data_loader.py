"""Batches: order, shuffling, reading ahead, its end and its errors; normalisation."""

import threading
import time

import numpy as np
import pytest
import torch

from rnndyn_fast.data import BatchLoader, normalise


class Numbers:
    """A split whose image i is filled with i; counts what was read, fails where told."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count = count
        self.fails_at = fails_at
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray, /) -> tuple[torch.Tensor, torch.Tensor]:
        self.reads += 1
        if self.fails_at is not None and self.fails_at in indices:
            raise OSError("disk gone")
        labels = torch.as_tensor(np.asarray(indices), dtype=torch.int64)
        return labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels


def labels_of(loader: BatchLoader) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def threads() -> int:
    return sum(thread.name == "rnndyn-read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_ascending_order(prefetch: int) -> None:
    loader = BatchLoader(Numbers(10), 4, prefetch=prefetch)
    assert len(loader) == 3
    assert labels_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert threads() == 0


def test_drop_last() -> None:
    loader = BatchLoader(Numbers(10), 4, drop_last=True)
    assert len(loader) == 2
    assert labels_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(BatchLoader(Numbers(8), 4)) == len(BatchLoader(Numbers(8), 4, drop_last=True)) == 2


def test_shuffling_depends_on_seed_and_epoch_only() -> None:
    def run(seed: int, epoch: int, prefetch: int = 2) -> list[int]:
        loader = BatchLoader(Numbers(50), 8, shuffle=True, seed=seed, prefetch=prefetch)
        loader.set_epoch(epoch)
        return [label for labels in labels_of(loader) for label in labels]

    first = run(0, 0)
    assert sorted(first) == list(range(50))
    assert first != list(range(50))
    assert run(0, 0) == run(0, 0, prefetch=0) == first
    assert run(0, 1) != first
    assert run(1, 0) != first
    loader = BatchLoader(Numbers(50), 8, shuffle=True)
    assert labels_of(loader) == labels_of(loader)  # the epoch changes only when it is set


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_reach_the_consumer_after_the_good_batches(prefetch: int) -> None:
    batches = iter(BatchLoader(Numbers(12, fails_at=9), 4, prefetch=prefetch))
    assert [next(batches)[1].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert threads() == 0


def test_thread_ends_when_the_consumer_stops() -> None:
    split = Numbers(4000)
    for _ in BatchLoader(split, 4, prefetch=3):
        break
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0
    assert split.reads <= 6  # what was taken, what was waiting, what was under way

    iterator = iter(BatchLoader(split, 4))
    next(iterator)
    assert threads() == 1
    del iterator
    assert threads() == 0


def test_iterations_side_by_side() -> None:
    loader = BatchLoader(Numbers(12), 4)
    pairs = [(a.tolist(), b.tolist()) for (_, a), (_, b) in zip(loader, loader, strict=True)]
    assert all(a == b for a, b in pairs)
    assert len(pairs) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int, got float"),
        ({"batch_size": 2, "prefetch": -1}, ValueError, "prefetch"),
        ({"batch_size": 2, "seed": -1}, ValueError, "seed"),
        ({"batch_size": 6, "drop_last": True}, ValueError, r"split: 5 image\(s\) make no batch"),
    ],
)
def test_loader_refuses(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchLoader(Numbers(5), **options)
    with pytest.raises(ValueError, match="epoch"):
        BatchLoader(Numbers(5), 1).set_epoch(-1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_normalise_against_the_formula(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = np.array([120.5, 110.0, 90.25]), np.array([60.0, 55.5, 70.0])
    images = raw if dtype == torch.uint8 else raw.to(dtype) / 255
    result = normalise(images, mean, std)
    scaled = raw.double() / 255
    expected = (scaled - torch.tensor(mean / 255).view(1, 3, 1, 1)) / torch.tensor(std / 255).view(1, 3, 1, 1)
    assert result.dtype == torch.float32
    assert result.shape == raw.shape
    # Values up to 2.6: a few roundings of float32.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("images", "mean", "std", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 2), [1.0] * 3, [1.0] * 3, ValueError, r"images: expected shape \[N, 3, H, W\]"),
        (torch.zeros(3, 2, 2), [1.0] * 3, [1.0] * 3, ValueError, "images"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.int64), [1.0] * 3, [1.0] * 3, TypeError, "images: expected dtype uint8"),
        (np.zeros((1, 3, 2, 2)), [1.0] * 3, [1.0] * 3, TypeError, "images: expected a tensor"),
        (torch.zeros(1, 3, 2, 2), [1.0], [1.0] * 3, ValueError, "mean: expected 3 finite"),
        (torch.zeros(1, 3, 2, 2), [np.nan] * 3, [1.0] * 3, ValueError, "mean: expected 3 finite"),
        (torch.zeros(1, 3, 2, 2), [1.0] * 3, [1.0, 0.0, 1.0], ValueError, "std: expected positive"),
    ],
)
def test_normalise_refuses(images: object, mean: list, std: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        normalise(images, mean, std)  # type: ignore[arg-type]
